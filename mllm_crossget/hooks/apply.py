"""Everything that ``accelerate_mllm`` changes in a model, in the order in which it is changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mllm_crossget.families.base import Family, config_at, module_at, tower_kind
from mllm_crossget.hooks.cross_tokens import CrossTokens
from mllm_crossget.hooks.dual import DualModel
from mllm_crossget.hooks.features import FEATURES, CutFeatures
from mllm_crossget.hooks.handle import HANDLE, Handle
from mllm_crossget.hooks.journal import Journal
from mllm_crossget.hooks.model import ReducedModel
from mllm_crossget.hooks.pooling import hook_pooling
from mllm_crossget.hooks.saving import SavedModel
from mllm_crossget.hooks.text import hook_text
from mllm_crossget.hooks.text_tower import hook_text_tower
from mllm_crossget.hooks.tower import hook_tower
from mllm_crossget.methods.base import Method
from mllm_crossget.schedule import TowerGeometry, make_schedule


def apply_method(
    model: nn.Module, family: Family, geometry: TowerGeometry, method: Method, tokens: dict[str, nn.Module]
) -> None:
    """Change the model; on any error it is put back as it was.

    Args:
        model: the transformers model, checked.
        family, geometry: what it is.
        method: the reduction.
        tokens: cross tokens that it had before, by place.
    """
    journal = Journal()
    handle = Handle(method, family, geometry, make_schedule(method, geometry), journal, tokens)
    try:
        journal.set_attribute(model, HANDLE, handle)
        if not method.is_identity:
            if method.reduces_vision and family.tower is not None:
                _hook_vision(model, handle)
                _hook_language(model, handle)
            if method.reduces_text:
                _hook_text_tower(model, handle)
            _hook_top(model, handle)
    except BaseException:
        journal.rollback()
        raise


def _hook_vision(model: Any, handle: Handle) -> None:
    family = handle.family
    vision_config = config_at(model.config, family.vision_config)
    tower: Any = module_at(model, family.tower or "")
    kind = tower_kind(vision_config.model_type, family.towers, type(model).__name__)
    encoder = module_at(tower, kind.encoder)
    handle.encoder_path = ".".join(filter(None, (family.tower, kind.encoder)))
    layers = getattr(encoder, kind.names.layers)
    vision = None
    if handle.schedule.cross:
        vision = _cross_tokens(handle, "vision", layers, vision_config.hidden_size)
        handle.cross_paths["vision"] = f"{handle.encoder_path}.cross_tokens"
    cosine = handle.method.uses_cosine(family.cosine)
    handle.tower = hook_tower(
        handle.journal, encoder, layers, kind.names, handle.method, handle.geometry, vision, cosine
    )
    if family.text_tower is not None and hasattr(tower, "head"):
        hook_pooling(handle.journal, tower.head, handle.tower)


def _hook_text_tower(model: Any, handle: Handle) -> None:
    tower = handle.family.text_tower
    if tower is None:  # refused before
        raise RuntimeError(f"family {handle.family.key!r} has no text tower")
    text_model: Any = module_at(model, tower.path)
    path = ".".join((tower.path, tower.encoder))
    handle.text_encoder_path = path
    tokens = None
    if handle.method.uses_cross_tokens:
        layers = getattr(module_at(model, path), tower.names.layers)
        tokens = _cross_tokens(handle, "text", layers, text_model.config.hidden_size)
        handle.cross_paths["text"] = f"{path}.cross_tokens"
    geometry = tower.geometry(model.config)
    handle.text_tower = hook_text_tower(handle.journal, text_model, tower, handle.method, geometry, tokens)


def _hook_language(model: Any, handle: Handle) -> None:
    path = handle.family.language_model
    if path is None or not handle.schedule.cross:
        return
    language_model: Any = module_at(model, path)
    layers = language_model.layers
    tokens = _cross_tokens(handle, "text", layers, model.config.get_text_config().hidden_size)
    handle.cross_paths["text"] = f"{path}.cross_tokens"
    hook_text(handle.journal, language_model, layers, tokens)


def _hook_top(model: Any, handle: Handle) -> None:
    family, journal = handle.family, handle.journal
    if family.features_owner is not None:
        owner = module_at(model, family.features_owner)
        counted = any(modality.counts is not None for modality in family.modalities)
        if family.features != "plain":
            journal.swap_class(owner, FEATURES[family.features])
        elif handle.schedule.drop_cross or counted:
            journal.swap_class(owner, CutFeatures if handle.schedule.drop_cross else FEATURES["plain"])
    if family.text_tower is not None and family.tower is not None:
        journal.swap_class(model, DualModel)
    else:
        journal.swap_class(model, ReducedModel if family.modalities else SavedModel)


def _cross_tokens(handle: Handle, place: str, layers: nn.ModuleList, width: int) -> nn.Module:
    """The cross tokens of a place: those the model had before, or new ones at zero."""
    if place not in handle.cross_tokens:
        handle.cross_tokens[place] = _cross_tokens_like(layers[0], len(layers), width)
    return handle.cross_tokens[place]


def _cross_tokens_like(layer: Any, layers: int, width: int) -> CrossTokens:
    """Zero cross tokens in a layer's floating dtype, on the device where the layer computes."""
    parameter = next(p for p in layer.parameters() if p.is_floating_point())
    device = parameter.device
    if device.type == "meta" and hasattr(layer, "_hf_hook"):  # offloaded by accelerate
        device = torch.device(layer._hf_hook.execution_device)
    return CrossTokens(layers, width, dtype=parameter.dtype, device=device)
