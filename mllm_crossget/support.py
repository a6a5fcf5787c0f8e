"""Checks whether a model can be accelerated with some settings. All checks run before anything is changed."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mllm_crossget import families as _registered_families  # noqa: F401 - registers them
from mllm_crossget import methods as _registered_methods  # noqa: F401 - registers them
from mllm_crossget.families.family import (
    BertNames,
    Family,
    FeatureKind,
    LayerNames,
    Positions,
    config_at,
    families,
    family_of,
    modality_geometry,
    module_at,
    refused_families,
    text_side_of,
    tower_kind,
)
from mllm_crossget.hooks.ground.state import base_model, trains_in_parallel
from mllm_crossget.hooks.language.sized_model import language_problem
from mllm_crossget.hooks.language.sized_readers import readers_problem
from mllm_crossget.hooks.language.staged_layers import stages_problem
from mllm_crossget.hooks.projector.kinds import MIXINS
from mllm_crossget.hooks.tower.attention import attention_problem
from mllm_crossget.methods.method import Method, Place
from mllm_crossget.schedule import MergeGeometry, TowerGeometry, make_schedule, make_text_schedule
from mllm_crossget.unlisted import unlisted_reason


def unsupported_reason(model: nn.Module) -> str | None:
    """Why a model cannot be accelerated and what to use instead, or None if it can."""
    try:
        supported_model(model)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def supported_model(model: nn.Module) -> tuple[Family, nn.Module]:
    """The family of a model, and the model without wrappers that compute the same.

    Raises:
        TypeError, ValueError: as in ``supported_family``; or the model was wrapped for parallel training, and the
            wrapper would miss new parameters.
    """
    target = base_model(model)
    if trains_in_parallel(model):
        raise ValueError(
            f"the model is wrapped in {type(model).__name__}: call accelerate_mllm before wrapping it for distributed "
            "training, on the transformers model itself"
        )
    return supported_family(target), target


def supported_family(model: nn.Module) -> Family:
    """The family of a model, whose structure is checked. Raises ``TypeError`` or ``ValueError`` with the reason."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a loaded transformers model, got {type(model).__name__}; use from_pretrained")
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None and isinstance(getattr(model, "module", None), nn.Module):
        raise ValueError(
            f"the model is wrapped in {type(model).__name__}: call accelerate_mllm before wrapping it for distributed "
            "training, on the transformers model itself"
        )
    if model_type in refused_families():
        raise ValueError(
            f"{type(model).__name__} (model type {model_type!r}) is not supported: {refused_families()[model_type]}"
        )
    family = family_of(getattr(model, "config", None), [kind.__name__ for kind in type(model).__mro__])
    if family is None:
        inside = _served_inside(model)
        if inside is not None:
            raise ValueError(
                f"{type(model).__name__} is no model that is served, but the module inside it at {inside!r} is: pass "
                f"model.{inside}"
            )
        raise ValueError(
            f"{type(model).__name__} (model type {model_type!r}) is not supported: "
            f"{_why_no_family(model, model_type)}; supported model types: "
            f"{', '.join(sorted({one.model_type for one in families().values()}))}"
        )
    geometry = family.geometry(model.config)
    try:
        _check_structure(model, family, tower=not isinstance(geometry, MergeGeometry))
    except AttributeError as error:
        raise ValueError(
            f"{type(model).__name__} is a part of a model of type {model_type!r} and cannot be accelerated by itself "
            f"({error}); pass the whole model, as from_pretrained makes it"
        ) from error
    if family.modalities and not hasattr(type(model), "generate"):
        raise ValueError(
            f"{type(model).__name__} (model type {model_type!r}) does not generate, and what it reads of its prompt is "
            "not written for fewer tokens; use the class of this model type that AutoModelForImageTextToText loads"
        )
    return family


def _why_no_family(model: nn.Module, model_type: str | None) -> str:
    served = [one for one in families().values() if one.model_type == model_type]
    if served:
        return f"this class is not served, {', '.join(name for one in served for name in one.classes) or 'others'} are"
    return unlisted_reason(getattr(model, "config", None))


def _served_inside(model: nn.Module) -> str | None:
    """Path to a supported model inside a user's own wrapper, or None."""
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if name and getattr(config, "model_type", None) is not None:
            served = family_of(config, [kind.__name__ for kind in type(module).__mro__])
            if served is not None and served.language_model is not None:
                return name
    return None


def _whole_model(model: nn.Module) -> str:
    """What to pass instead of a part of a model, which ``AutoModel`` loads too."""
    config: Any = model.config
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    if whole is None or whole == type(model).__name__:
        return "pass the full model, as from_pretrained makes it"
    return f"pass the full model, as {whole}.from_pretrained or AutoModelForImageTextToText loads it"


def _check_structure(model: nn.Module, family: Family, tower: bool) -> None:
    """Check that the model has all modules that the hooks need, and those in the layers of the tower if ``tower``.
    Raises ``ValueError`` that names what is missing."""
    paths = [family.tower, family.language_model, family.projector, family.features_owner]
    paths += [modality.tower for modality in family.modalities]
    paths += [*family.vision_projection, *family.text_projection]
    side = text_side_of(family, model.config)
    paths += [side.model, f"{side.model}.{side.layers}"] if side is not None else []
    for path in filter(None, paths):
        try:
            module_at(model, path)
        except AttributeError as error:
            raise ValueError(f"{type(model).__name__} has no {path!r}; {_whole_model(model)}") from error
    if tower and family.tower is not None:
        vision_type = config_at(model.config, family.vision_config).model_type
        kind = tower_kind(vision_type, family.vision.kinds, type(model).__name__)
        for path in (family.tower, *(modality.tower for modality in family.modalities if modality.tower)):
            _check_layers(model, "vision", module_at(module_at(model, path), kind.encoder), kind.names)
    if family.text_tower is not None:
        text = family.text_tower
        _check_layers(model, "text", module_at(module_at(model, text.path), text.encoder), text.names)
        if text.reader:
            _check_layers(model, "text", module_at(module_at(model, text.reader), text.encoder), text.names)
    if any("FSDPModule" in [kind.__name__ for kind in type(module).__mro__] for module in model.modules()):
        raise ValueError("the model is sharded already (fully_shard): call accelerate_mllm before sharding it")
    vision = module_at(model, family.tower).parameters() if tower and family.tower is not None else ()
    if any(type(parameter).__name__ == "DTensor" for parameter in vision):
        raise ValueError(
            f"the vision tower of {type(model).__name__} is sharded by a tensor-parallel plan, so no process sees all "
            "of its heads; use a plan that shards the language model alone"
        )


def _check_layers(model: nn.Module, tower: str, encoder: nn.Module, names: LayerNames | BertNames) -> None:
    for layer in getattr(encoder, names.layers):
        for name in names.parts:
            if not hasattr(layer, name):
                raise ValueError(f"a {tower} layer of {type(model).__name__} has no {name!r}: unknown structure")
        problem = attention_problem(module_at(getattr(layer, names.attention), names.inner))
        if problem is not None:
            raise ValueError(problem)


def check_dials(method: Method, family: Family, model: Any) -> None:
    """Check that the method's place and its settings fit the model's towers and geometry. Raises ``ValueError``."""
    problem = place_problem(method, family, model)
    if problem is not None:
        raise ValueError(
            f"{type(method).__name__} acts at {type(model).__name__}'s {method.place.value}, which is not possible: "
            f"{problem}"
        )
    if method.learned_parts.question_rank:
        problem = _question_problem(method, family, model)
        if problem is not None:
            raise ValueError(
                f"question_rank={method.learned_parts.question_rank} is not possible in {type(model).__name__} (type "
                f"{family.model_type!r}): {problem}; leave it out"
            )
    if method.is_dynamic:
        _refuse_fixed_counts(model, family)
        _check_thresholds(method, family, model.config)
    if method.positions is not None and not method.is_published:
        _check_positions(method, family, model)
    if method.size_bias and not method.is_published:
        problem = _sizes_problem(family, model)
        if problem is not None:
            raise ValueError(f"size_bias=True is not possible in {type(model).__name__}: {problem}; leave it out")
    text = family.text_tower
    if text is None:
        given = [name for name in ("vision_r", "text_r", "text_keep_ratio") if getattr(method, name) is not None]
        if given:
            raise ValueError(
                f"{type(model).__name__} has no text tower of its own to reduce, so {given} cannot be used; use "
                "keep_ratio, visual_tokens or r"
            )
    elif method.reduces_text:
        geometry = text.geometry(model.config)
        make_text_schedule(method, geometry, geometry.context)
    if text is not None and method.reduces_text and method.per_text is not None and not text.causal:
        reason = "is read from its last column" if text.appends else "is a BERT, and its pruning is not implemented"
        raise ValueError(
            f"MADTP prunes CLIP's text tower, but not that of {type(model).__name__}, which {reason}; leave "
            "text_keep_ratio and text_r out, or use CrossGetConfig"
        )
    if family.tower is not None:
        make_schedule(method, family.geometry(model.config))
        for modality in family.modalities:
            if modality.geometry is not None:
                _check_own_tower(method, modality.name, modality_geometry(family, modality, model.config))
    elif method.reduces_vision:
        raise ValueError(
            f"{type(model).__name__} has no vision tower: give text_keep_ratio or text_r instead of keep_ratio, "
            "visual_tokens or r"
        )


def _sizes_problem(family: Family, model: nn.Module) -> str | None:
    """Why token sizes cannot reach what reads a model's tokens, or None if they can."""
    if family.modalities and family.language_model is not None:
        return language_problem(module_at(model, family.language_model))
    if family.vision.is_read_across:
        return readers_problem(model, family)
    return None if family.modalities else "no language model reads merged tokens, and no module cross-attends to them"


def place_problem(method: Method, family: Family, model: Any) -> str | None:
    """Why a method cannot act at its place in a model, or None if it can."""
    if method.place is Place.TOWER_LAYERS:
        if _wants_of_images(method) or method.needs_features:
            return "inside layers there are keys and importance, not features, the question or other layers' attention"
        return None
    if method.place is Place.LANGUAGE_MODEL:
        return _language_model_problem(method, family, model)
    if method.is_dynamic:
        return "a number of tokens per image is served inside the tower's layers alone"
    if method.reduces_text:
        return "text is reduced inside the text tower's layers alone; leave text_keep_ratio and text_r out"
    reason = MIXINS[family.features].refused.get(method.place)
    if reason is not None:
        return reason
    return (
        _projector_problem(method, family, model)
        if method.place is Place.PROJECTOR
        else _output_problem(method, family, model)
    )


def _language_model_problem(method: Method, family: Family, model: Any) -> str | None:
    acting = method.in_language_model
    if acting is None:
        return "the method does not say where tokens leave there (in_language_model)"
    if method.reduces_text:
        return "text is reduced inside the text tower's layers alone; leave text_keep_ratio and text_r out"
    if not family.modalities or family.features_owner is None or family.language_model is None:
        return "its prompt has no placeholders that features of the image take, so its visual tokens are not known"
    if family.language_flops is not None:
        return "its language model is no plain decoder"
    language_model: Any = module_at(model, family.language_model)
    problem = stages_problem(language_model, acting)
    if problem is not None or not method.reduces_vision:
        return problem
    try:
        acting.stage_layers(len(language_model.layers), family.geometry(model.config).placeholders)
    except ValueError as error:
        return str(error)
    return None


def _wants_of_images(method: Method) -> bool:
    """Whether a method needs a signal that is not available inside the tower's layers."""
    return (
        method.needs_class_attention
        or method.needs_salience
        or method.needs_middle
        or method.needs_next_layer
        or method.needs_text
    )


def _projector_problem(method: Method, family: Family, model: Any) -> str | None:
    if family.features_owner is None or not family.modalities:
        return "its prompt has no placeholders that features of the image take, so there is nothing to choose from"
    if method.needs_class_attention:
        return "behind the projector there is no class token, whose attention the method wants"
    if method.needs_middle or method.needs_next_layer:
        return "behind the projector there are no other layers, which the method wants to know of"
    if method.needs_salience:
        geometry = family.geometry(model.config)
        plain = family.features is FeatureKind.PLAIN and isinstance(geometry, TowerGeometry) and geometry.cells is None
        if not plain:
            return "its features are no single tokens of its tower, whose attention the method wants"
    return None


def _question_problem(method: Method, family: Family, model: Any) -> str | None:
    """Why the vision cross tokens cannot depend on the question, or None if they can."""
    if not family.modalities:
        return "its images are encoded without a prompt"
    geometry = family.geometry(model.config)
    if not isinstance(geometry, TowerGeometry) or geometry.block > 1:
        return "no cross token is in its vision tower"
    if any(modality.tower for modality in family.modalities):
        return "it has a tower for each kind of input"
    if family.features is FeatureKind.PACKED_GRID or (geometry.cells is not None and not geometry.fixed):
        return "its tower takes images of different sizes in one row or one after the other, not one row each"
    channels = model.get_input_embeddings().embedding_dim
    if method.learned_parts.question_rank > channels:
        return f"a question has {channels} channels; a rank of a few, such as 8, is enough"
    return None


def _output_problem(method: Method, family: Family, model: Any) -> str | None:
    if not family.towers or family.tower is None:
        return "it has no vision tower"
    if family.text_tower is not None and not family.text_tower.reads_image:
        return "its image embedding is all that is read of the tower's output"
    geometry = family.geometry(model.config)
    if method.needs_class_attention and not getattr(geometry, "prefix", 0):
        return "its tower has no class token, whose attention the method wants"
    if method.needs_text:
        return "at a tower's output the question cannot be compared with its tokens, which the projector has not mapped"
    return None


def _check_thresholds(method: Method, family: Family, config: Any) -> None:
    """Raise ``ValueError`` unless there is a threshold for every layer, or none. Further thresholds would not be used,
    and layers without one would remove nothing."""
    of_images = () if method.per_image is None else method.per_image.threshold or ()
    of_texts = getattr(method.per_text, "text_threshold", None) or ()
    vision = family.geometry(config)
    layers = vision.layers if isinstance(vision, TowerGeometry) else 0
    text_layers = family.text_tower.geometry(config).layers if family.text_tower is not None else 0
    for name, tower, given, wanted in (
        ("threshold", "vision", of_images, layers),
        ("text_threshold", "text", of_texts, text_layers),
    ):
        if given and wanted and len(given) != wanted:
            raise ValueError(
                f"{name} lists {len(given)} layers, the {tower} tower has {wanted}: give one number per layer, as "
                "calibrate finds them"
            )


def _check_own_tower(method: Method, name: str, geometry: TowerGeometry) -> None:
    try:
        make_schedule(method, geometry)
    except ValueError as error:
        raise ValueError(f"in the tower of the {name}s, which reduces each frame like an image: {error}") from error


def _check_positions(method: Method, family: Family, model: nn.Module) -> None:
    """Raise ``ValueError`` for settings of positions if the prompt is unchanged, or positions must keep their gaps."""
    if not family.modalities:
        raise ValueError(
            f"{type(model).__name__} gets no shorter prompt: positions={method.positions!r} says nothing, leave it out"
        )
    if family.positions is Positions.GRID and not method.keeps_positions:
        raise ValueError(
            f"positions={method.positions!r}, but image tokens of {type(model).__name__} have positions in time, "
            "height and width, which are always kept; leave it out"
        )


def _refuse_fixed_counts(model: nn.Module, family: Family) -> None:
    """Raise ``ValueError`` for a model that needs the same number of tokens for every image."""
    if not family.dynamic:
        able = ", ".join(sorted({known.model_type for known in families().values() if known.dynamic}))
        raise ValueError(
            f"{type(model).__name__} (model type {family.model_type!r}) cannot take a number of tokens per image yet; "
            f"model types that can: {able}. Use a method with a fixed number, such as CrossGetConfig(keep_ratio=0.5)"
        )
    if not family.tower and hasattr(model, "head"):
        raise ValueError(
            f"{type(model).__name__} has a pooling head, which would count rows that belong to no token; build it with "
            "vision_use_head=False, or use a method with a fixed number of tokens"
        )
