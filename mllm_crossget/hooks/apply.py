"""Everything that ``accelerate_mllm`` changes in a model, in the order in which it is changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mllm_crossget.families.family import (
    BertNames,
    Family,
    FeatureKind,
    LayerNames,
    config_at,
    modality_geometry,
    module_at,
    text_side_of,
    tower_kind,
)
from mllm_crossget.hooks.ground.alignment_tokens import AlignmentTokens
from mllm_crossget.hooks.ground.cross_tokens import CrossTokens
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.question_map import QuestionMap
from mllm_crossget.hooks.ground.state import HANDLE, Handle, LanguageView, MergeState, ModalityTower, TowerState
from mllm_crossget.hooks.language.sized_model import hook_language_model
from mllm_crossget.hooks.language.sized_readers import hook_sizes
from mllm_crossget.hooks.model.bare_tower import RaggedTower
from mllm_crossget.hooks.model.dual_encoder import DualModel
from mllm_crossget.hooks.model.headless_model import hook_headless
from mllm_crossget.hooks.model.madtp_loss import hook_heard
from mllm_crossget.hooks.model.placeholder_model import AlignedModel, ReducedModel
from mllm_crossget.hooks.model.staged_model import hook_staged_model
from mllm_crossget.hooks.projector.averages import hook_projector
from mllm_crossget.hooks.projector.features import FeaturesMixin, ReducedFeatures
from mllm_crossget.hooks.projector.kinds import MIXINS
from mllm_crossget.hooks.projector.post_merge import MergedFeatures, MergedVideoFeatures, hook_merge
from mllm_crossget.hooks.projector.ragged_features import install_ragged_features
from mllm_crossget.hooks.projector.readers import RaggedCrossAttention, RaggedReader, hook_padding, hook_reader
from mllm_crossget.hooks.projector.selected_output import SelectedFeatures
from mllm_crossget.hooks.text.answer_decoder import hook_question
from mllm_crossget.hooks.text.bert_text import hook_text_encoder
from mllm_crossget.hooks.text.clip_text import hook_text_tower
from mllm_crossget.hooks.text.counts_per_text import RaggedTextEncoder, RaggedTextLayer
from mllm_crossget.hooks.text.first_token import hook_text
from mllm_crossget.hooks.tower.cells import CellLayer, CellTower
from mllm_crossget.hooks.tower.counts_per_image import RaggedEncoder, RaggedLayer
from mllm_crossget.hooks.tower.fixed_counts import hook_tower
from mllm_crossget.hooks.tower.listening import hook_listener
from mllm_crossget.hooks.tower.output_selection import hook_output
from mllm_crossget.hooks.tower.pooling_head import hook_pooling
from mllm_crossget.methods.method import Method, Place
from mllm_crossget.schedule import Geometry, MergeGeometry, TowerGeometry, make_schedule

_LONGEST = "_previous_max_cache_length"
"""The attribute in which ``generate`` keeps the length of the longest static cache so far, to avoid compiling again."""


def apply_method(
    model: nn.Module, family: Family, geometry: Geometry, method: Method, tokens: dict[str, nn.Module]
) -> None:
    """Apply a method to a model. On any error all changes are undone.

    Args:
        model: the transformers model, which was checked before.
        family: its family.
        geometry: geometry of the part that the method acts on (``schedule.acting_geometry``).
        method: the reduction.
        tokens: cross tokens that the model had before, by place.
    """
    journal = Journal()
    handle = Handle(method, family, geometry, make_schedule(method, geometry), journal, tokens)
    try:
        journal.set_attribute(model, HANDLE, handle)
        if not method.is_identity and method.in_language_model is not None:
            _hook_stages(model, handle)
        elif not method.is_identity:
            if isinstance(geometry, MergeGeometry):
                owner = module_at(model, family.features_owner or "")
                handle.merge = hook_merge(journal, owner, method, family.modalities)
                _hook_listener(model, handle, handle.merge)
            elif method.reduces_vision and method.place is Place.TOWER_OUTPUT:
                _hook_output(model, handle, geometry)
            elif method.reduces_vision and family.tower is not None:
                _hook_vision(model, handle, geometry)
            if method.reduces_text:
                _hook_text_tower(model, handle)
            _hook_language(model, handle)  # its mixins go before a text encoder's: it writes before a layer reads
            _weigh_sizes(model, handle)
            _add_alignment_tokens(model, handle)
            hook_heard(journal, model, handle)
            _hook_top(model, handle)
            if handle.weighs_readers:
                hook_sizes(journal, model, handle)
    except BaseException:
        journal.rollback()
        raise


def _hook_stages(model: Any, handle: Handle) -> None:
    """Hook the layers of the language model alone; the vision side is unchanged."""
    method = handle.method.in_language_model
    if method is None:  # refused before
        raise RuntimeError(f"{type(handle.method).__name__} does not act inside the language model")
    language_model: Any = module_at(model, handle.family.language_model or "")
    handle.text_layers = len(language_model.layers)
    handle.stage_layers = method.stage_layers(handle.text_layers, handle.schedule.placeholders)
    hook_staged_model(handle.journal, model, handle)


def _hook_vision(model: Any, handle: Handle, geometry: TowerGeometry) -> None:
    family = handle.family
    tower: Any = module_at(model, family.tower or "")
    handle.encoder_path, handle.tower = _hook_encoder(model, handle, family.tower or "", "vision", geometry)
    for modality in family.modalities:
        if modality.tower and modality.geometry is not None:
            own_geometry = modality_geometry(family, modality, model.config)
            hooked = _hook_encoder(model, handle, modality.tower, modality.name, own_geometry)
            handle.modality_towers[modality.name] = ModalityTower(
                hooked[0], make_schedule(handle.method, own_geometry), hooked[1]
            )
    if family.text_tower is not None and family.text_tower.appends and hasattr(tower, "head"):
        hook_pooling(handle.journal, tower, handle.tower)
    if family.vision.view and handle.method.selects_at_output and handle.method.schedule_kind in ("auto", "output"):
        hook_projector(handle.journal, module_at(model, family.vision.view[-1]))
    if handle.method.is_dynamic and (family.readers or family.cross_attentions is not None):
        _hook_readers(model, handle, tower.post_layernorm)


def _hook_encoder(model: Any, handle: Handle, path: str, place: str, geometry: TowerGeometry) -> tuple[str, TowerState]:
    """Hook the layers of the tower at a path, with the cross tokens of a place; returns the encoder's path and
    state."""
    family, method = handle.family, handle.method
    vision_config = config_at(model.config, family.vision_config)
    kind = tower_kind(vision_config.model_type, family.vision.kinds, type(model).__name__)
    encoder = module_at(module_at(model, path), kind.encoder)
    encoder_path = ".".join(filter(None, (path, kind.encoder)))
    layers = getattr(encoder, kind.names.layers)
    cross = None
    if handle.schedule.cross:
        cross = _cross_tokens(handle, place, layers, vision_config.hidden_size)
        handle.cross_paths[place] = f"{encoder_path}.cross_tokens"
        _add_question_map(model, handle, encoder, encoder_path, layers, vision_config.hidden_size)
    mixins = (
        (RaggedEncoder, RaggedLayer) if method.is_dynamic else (CellTower, CellLayer) if kind.names.packed else None
    )
    cosine = method.uses_cosine(family.cosine)
    state = hook_tower(
        handle.journal, encoder, layers, kind.names, method, geometry, cosine=cosine, cross_tokens=cross, mixins=mixins
    )
    state.view = LanguageView(model, family.vision.view) if family.vision.view else None
    return encoder_path, state


def _add_question_map(
    model: Any, handle: Handle, encoder: nn.Module, path: str, layers: nn.ModuleList, width: int
) -> None:
    """Add the map from the question to the cross tokens, if the method has one: the model's old one if it fits."""
    rank = handle.method.learned_parts.question_rank
    if not rank:
        return
    text_width = model.get_input_embeddings().embedding_dim
    new_map = QuestionMap(len(layers), width, text_width, rank, *_kind_of(layers[0]))
    old = handle.cross_tokens.get("question")
    if old is None or _shapes(old) != _shapes(new_map):
        handle.cross_tokens["question"] = new_map
    handle.journal.add_module(encoder, "question_map", handle.cross_tokens["question"])
    handle.cross_paths["question"] = f"{path}.question_map"


def _hook_output(model: Any, handle: Handle, geometry: TowerGeometry) -> None:
    """Hook the layer whose output is read, for a method that selects tokens there."""
    encoder, path, names = vision_encoder(model, handle.family)
    handle.encoder_path = path
    handle.tower = hook_output(handle.journal, encoder, names, handle.method, geometry)


def _hook_listener(model: Any, handle: Handle, state: MergeState) -> None:
    """Record the tower's attention for a method that acts behind the projector and needs it; checked before."""
    geometry = handle.family.geometry(model.config)
    if not handle.method.needs_salience or not isinstance(geometry, TowerGeometry):
        return
    encoder, _, names = vision_encoder(model, handle.family)
    layer = getattr(encoder, names.layers)[geometry.read - 1]
    state.listener = hook_listener(handle.journal, layer, names, paid=geometry.prefix > 0)


def vision_encoder(model: Any, family: Family) -> tuple[nn.Module, str, LayerNames]:
    """The module that holds the vision tower's layers, the path to it, and the names inside."""
    path = family.tower or ""
    kind = tower_kind(
        config_at(model.config, family.vision_config).model_type, family.vision.kinds, type(model).__name__
    )
    encoder = module_at(module_at(model, path), kind.encoder)
    return encoder, ".".join(filter(None, (path, kind.encoder))), kind.names


def _hook_readers(model: Any, handle: Handle, norm: nn.Module) -> None:
    """Let modules that cross-attend to the tower ignore padding, which the norm after the last layer keeps at zero."""
    hook_padding(handle.journal, norm)
    for path in handle.family.readers:
        hook_reader(handle.journal, module_at(model, path), RaggedReader)
    if handle.family.cross_attentions is not None:
        layers, inside = handle.family.cross_attentions
        for layer in module_at(model, layers).children():
            hook_reader(handle.journal, module_at(layer, inside), RaggedCrossAttention)


def _hook_text_tower(model: Any, handle: Handle) -> None:
    tower = handle.family.text_tower
    if tower is None:  # refused before
        raise RuntimeError(f"family {handle.family.key!r} has no text tower")
    text_model: Any = module_at(model, tower.path)
    path = ".".join((tower.path, tower.encoder))
    handle.text_encoder_path = path
    geometry = tower.geometry(model.config)
    if isinstance(tower.names, BertNames):
        handle.text_tower = hook_text_encoder(handle.journal, text_model, tower, handle.method, geometry)
        return
    tokens = None
    if handle.method.uses_cross_tokens:
        layers = getattr(module_at(model, path), tower.names.layers)
        tokens = _cross_tokens(handle, "text", layers, text_model.config.hidden_size)
        handle.cross_paths["text"] = f"{path}.cross_tokens"
    mixins = None if handle.method.per_text is None else (RaggedTextEncoder, RaggedTextLayer)
    handle.text_tower = hook_text_tower(handle.journal, text_model, tower, handle.method, geometry, tokens, mixins)


def _add_alignment_tokens(model: Any, handle: Handle) -> None:
    """Add the method's alignment tokens, if it has any: those the model had before if they fit, else new ones. They are
    in the vision tower, or in the text tower if that alone is reduced."""
    space, family, tower = handle.method.learned_parts.alignment, handle.family, handle.tower
    path = handle.encoder_path or handle.text_encoder_path
    if space is None or not path:
        return
    encoder: Any = module_at(model, path)
    seen = tower is not None
    layers = getattr(encoder, "layers" if tower is None else tower.names.layers)
    text_count, text_width = _text_side(model, handle)
    tower_width = config_at(model.config, family.vision_config).hidden_size if seen else text_width
    width = space.width if space.maps else tower_width
    new_tokens = AlignmentTokens(
        space.count,
        width,
        len(layers) if seen else 0,
        tower_width,
        space.maps,
        text_count if space.maps or text_width != width else 0,
        text_width,
        *_kind_of(layers[0]),
    )
    old = handle.cross_tokens.get("alignment")
    if old is None or _shapes(old) != _shapes(new_tokens):
        handle.cross_tokens["alignment"] = new_tokens
    handle.journal.add_module(encoder, "alignment_tokens", handle.cross_tokens["alignment"])
    handle.cross_paths["alignment"] = f"{path}.alignment_tokens"
    if tower is not None:
        tower.alignment_width = width
    if handle.text_tower is not None:
        handle.text_tower.alignment_owner, handle.text_tower.alignment_width = encoder, width


def _text_side(model: Any, handle: Handle) -> tuple[int, int]:
    """The number of maps from the text side to the alignment tokens, and their input width.

    A dual encoder's text tower has one map per layer, as published for CLIP. A language model has one for all layers:
    one map per layer would have 100 million weights in a LLaVA-1.5-7B.
    """
    side, tower = text_side_of(handle.family, model.config), handle.family.text_tower
    if tower is not None and tower.appends:
        text = config_at(model.config, tower.config)
        return text.num_hidden_layers, text.hidden_size
    return (0, 0) if side is None else (1, config_at(model.config, side.config).hidden_size)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def _hook_language(model: Any, handle: Handle) -> None:
    side, tower = text_side_of(handle.family, model.config), handle.family.text_tower
    text_alone = tower is not None and not tower.appends and handle.text_tower is not None
    if side is None or not (handle.schedule.cross or (text_alone and handle.method.uses_cross_tokens)):
        return
    language_model = module_at(model, side.model)
    layers: Any = module_at(language_model, side.layers)
    tokens = _cross_tokens(handle, "text", layers, config_at(model.config, side.config).hidden_size)
    handle.text_path = side.model
    handle.cross_paths["text"] = f"{side.model}.cross_tokens"
    hook_text(handle.journal, language_model, layers, tokens, side.skip, merges=handle.text_tower is not None)


def _weigh_sizes(model: Any, handle: Handle) -> None:
    """Let the language model's attention handle token sizes and positions with gaps."""
    if not (handle.size_bias or handle.keeps_positions) or handle.family.language_model is None:
        return
    language_model: Any = module_at(model, handle.family.language_model)
    hook_language_model(handle.journal, language_model, language_model.layers)


def _hook_top(model: Any, handle: Handle) -> None:
    family, journal = handle.family, handle.journal
    if _LONGEST in vars(model):  # otherwise static caches would keep the length of the longer, full prompts
        journal.set_attribute(model, _LONGEST, -1)
    if family.features_owner is not None:
        owner = module_at(model, family.features_owner)
        counted = any(modality.counts is not None for modality in family.modalities)
        if handle.method.is_dynamic:
            install_ragged_features(journal, owner, handle)
        elif handle.method.place is not Place.TOWER_LAYERS:
            _features_of_selection(model, handle).install(journal, owner, handle)
        elif family.features is not FeatureKind.PLAIN or handle.tower is not None:
            MIXINS[family.features].install(journal, owner, handle)
        elif counted:
            journal.swap_class(owner, ReducedFeatures)
    if family.text_tower is not None and family.text_tower.appends and family.tower is not None:
        journal.swap_class(model, DualModel)
    elif handle.method.is_dynamic and family.tower == "":
        journal.swap_class(model, RaggedTower)
    elif family.modalities:
        hook_headless(journal, model, handle)
        journal.swap_class(model, ReducedModel)
    else:
        journal.swap_class(model, AlignedModel)
    text = family.text_tower
    if handle.text_tower is not None and text is not None and text.reader and isinstance(text.names, BertNames):
        hook_question(journal, model, text, text.names, handle.method.proportional_attention)


def _features_of_selection(model: Any, handle: Handle) -> type[FeaturesMixin]:
    """The mixin for a method that acts once, at the tower's output or behind the projector. A family that always merges
    behind the projector has its own mixin."""
    if handle.method.place is Place.TOWER_OUTPUT:
        return SelectedFeatures
    if isinstance(handle.family.geometry(model.config), MergeGeometry):
        return MIXINS[handle.family.features]
    videos = any(modality.encode == "get_video_features" for modality in handle.family.modalities)
    return MergedVideoFeatures if videos else MergedFeatures


def _cross_tokens(handle: Handle, place: str, layers: nn.ModuleList, width: int) -> nn.Module:
    """The cross tokens of a place: those the model had before, else new ones at zero."""
    if place not in handle.cross_tokens:
        handle.cross_tokens[place] = _cross_tokens_like(layers[0], len(layers), width)
    return handle.cross_tokens[place]


def _cross_tokens_like(layer: Any, layers: int, width: int) -> CrossTokens:
    """Zero cross tokens in a layer's floating dtype, on the device where the layer computes."""
    return CrossTokens(layers, width, *_kind_of(layer))


def _kind_of(layer: Any) -> tuple[torch.dtype, torch.device]:
    """A layer's floating dtype, and the device that it computes on."""
    parameter = next(p for p in layer.parameters() if p.is_floating_point())
    device = parameter.device
    if device.type == "meta":  # offloaded by accelerate: a hook on the layer or on its parts names the device
        hooks = [module.__dict__["_hf_hook"] for module in layer.modules() if "_hf_hook" in module.__dict__]
        places = [getattr(one, "execution_device", None) for hook in hooks for one in getattr(hook, "hooks", (hook,))]
        device = next((torch.device(place) for place in places if place is not None), device)
    return parameter.dtype, device
