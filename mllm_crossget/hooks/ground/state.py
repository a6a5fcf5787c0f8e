"""What an accelerated model and its hooked modules carry: settings, counts, learned tokens and the way back.

Plain typed data without behaviour or state of a forward. Shapes: B batch, R removed, T tokens after a layer, N tokens
in front of the first layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import Tensor, nn

from mllm_crossget.families.family import Family, LayerNames, Positions, TextTower, module_at
from mllm_crossget.families.modality import Modality
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.module_tree import TreeChange
from mllm_crossget.hooks.ground.vision_cache import VisionCache
from mllm_crossget.methods.method import Method
from mllm_crossget.ops.matching import Match
from mllm_crossget.ops.ragged import Step
from mllm_crossget.schedule import (
    Geometry,
    MergeGeometry,
    Schedule,
    TextGeometry,
    TowerGeometry,
    behind_cells,
    behind_grid,
    make_schedule,
    make_text_schedule,
    of_other_size,
    patches_left,
)

HANDLE = "_mllm_crossget"
# Lent to a state for a while, in one thread (``ground.call_state``):
TRACE = "trace"
"""A list that gets one ``LayerTrace`` per layer, or per step behind a projector."""
RUNNING = "running"
"""True while features are being made that will be merged."""
QUESTION = "question"
"""What is asked about the images of a call, for methods that read it: an ``AskedText`` by the name of the method that
encodes them, a row for each image (for a tower: for each of its images)."""
CALIBRATION = "calibration"
"""What finds the layers' thresholds while ``calibrate`` runs."""


@dataclass
class LayerTrace:
    """What one layer decided. B batch, R removed, T tokens after the layer, N tokens in front of the first layer.

    Attributes:
        match: the layer's matching, or None where it removed nothing; a ``Step`` where counts differ between images.
        size: (B, T) patch tokens in each token after the layer; 0 in rows behind an image's last token, where counts
            differ between images.
        source: (B, N) row, after this layer, that every original token (class and cross token too) has become.
    """

    match: Match | Step | None
    size: Tensor
    source: Tensor


@dataclass(frozen=True)
class LanguageView:
    """A tower's tokens as the language model sees them.

    Attributes:
        model: top-level model.
        paths: of its modules that map tokens to features, one after the other (``VisionSide.view``). Looked up at every
            call, because PEFT and quantisation replace modules.
    """

    model: nn.Module
    paths: tuple[str, ...]

    def __call__(self, tokens_BTD: Tensor) -> Tensor:
        """(B, T, ·) features of (B, T, D) tokens, with their gradients, on the tokens' device."""
        features = tokens_BTD
        for path in self.paths:
            features = module_at(self.model, path)(features)
        return features.to(tokens_BTD.device)


@dataclass
class TowerState:
    """What the hooked encoder knows; attached to the encoder.

    Attributes:
        method, geometry: what to do, for which tower.
        names: where a layer keeps its norms, attention and MLP.
        cosine: whether the importance is the cosine with the cross token's query (CrossGET's CLIP flavour).
        keeps_sizes: whether a module behind the encoder wants the token sizes.
        alignment_width: of the encoder's alignment tokens; 0 if it has none.
        ignores_mask: True if the caller has verified that the mask is all ones.
        view: features of the tokens behind the layer that is read, which a selection at its output compares and
            averages; None: the layer's keys are compared, and its tokens averaged.
        at_output: whether a layer that removes tokens does so behind its MLP, in what it returns, and not in front of
            it.
    """

    method: Method
    geometry: TowerGeometry
    names: LayerNames
    cosine: bool = False
    keeps_sizes: bool = False
    alignment_width: int = 0
    ignores_mask: bool = False
    view: LanguageView | None = None
    at_output: bool = False
    schedules: dict[int, Schedule] = field(default_factory=dict)
    caps: dict[int, Schedule] = field(default_factory=dict)

    def schedule(self, tokens: int) -> Schedule:
        """Counts for an image of ``tokens`` tokens (other image sizes have other patch counts)."""
        if tokens not in self.schedules:
            geometry = self.geometry.of_patches(tokens - self.geometry.prefix)
            one_size = geometry.cells is None and geometry.fixed
            method = self.method if one_size else of_other_size(self.method, geometry)
            self.schedules[tokens] = make_schedule(method, geometry)
        return self.schedules[tokens]

    def most_tokens(self, tokens: int, layer: int) -> int:
        """Tokens that the cap of a dynamic method allows behind a layer, of an image of ``tokens`` tokens."""
        if tokens not in self.caps:
            geometry, per_image = self.geometry.of_patches(tokens - self.geometry.prefix), self.method.per_image
            if per_image is None or per_image.max_visual_tokens is None:
                raise RuntimeError(f"{self.method} has no cap on the tokens of an image")
            most = min(per_image.max_visual_tokens, geometry.placeholders)
            capped = replace(self.method, keep_ratio=None, r=None, visual_tokens=most)
            self.caps[tokens] = make_schedule(capped, geometry)
        return self.caps[tokens].tokens[layer + 1]


@dataclass
class MergeState:
    """What the owner of ``get_image_features`` knows.

    Attributes:
        method, modalities: what to do, with which inputs.
        tower: the reduced tower in front of the projector, whose share of tokens is kept here too; None without one.
        listener: what hears the attention of the layer that is read, where the method wants it, else None.
    """

    method: Method
    modalities: tuple[Modality, ...]
    tower: TowerState | None = None
    listener: Any = None
    schedules: dict[int, Schedule] = field(default_factory=dict)

    def schedule(self, tokens: int) -> Schedule:
        """Counts for an image of ``tokens`` tokens."""
        if tokens not in self.schedules and self.tower is not None and self.tower.geometry.block > 1:
            self.schedules[tokens] = behind_cells(self.tower.schedule(tokens))
        if tokens not in self.schedules:
            method = self.method
            if self.tower is not None:
                geometry = self.tower.geometry.of_cells(tokens)
                own = self.tower.schedule(geometry.patches + geometry.prefix)
                method = behind_grid(method, geometry, patches_left(own, geometry))
            self.schedules[tokens] = make_schedule(method, MergeGeometry(tokens, fixed=False))
        return self.schedules[tokens]


@dataclass
class TextTowerState:
    """What the hooked text tower knows; attached to the model, the encoder and its layers.

    Attributes:
        method, geometry: what to do, for which tower.
        tower: the family's description of the tower.
        config: the text model's own configuration.
        alignment_owner: the module whose ``alignment_tokens`` the texts are compared with, or None. Looked up there,
            because PEFT replaces them.
        alignment_width: of these tokens; 0 for none.
    """

    method: Method
    geometry: TextGeometry
    tower: TextTower
    config: Any
    alignment_owner: Any = None
    alignment_width: int = 0
    schedules: dict[int, Schedule] = field(default_factory=dict)

    def schedule(self, tokens: int) -> Schedule:
        """Counts for a text of ``tokens`` tokens."""
        if tokens not in self.schedules:
            self.schedules[tokens] = make_text_schedule(self.method, self.geometry, tokens)
        return self.schedules[tokens]


@dataclass
class ModalityTower:
    """The tower of one modality beside the vision tower (videos of VideoLlava).

    Attributes:
        encoder_path: path to the module that holds its layers.
        schedule: counts for one frame.
        state: of the hooked tower.
    """

    encoder_path: str
    schedule: Schedule
    state: TowerState


@dataclass
class Handle:
    """Attached to the top-level model.

    Attributes:
        method, family, geometry, schedule: the settings, and the counts that follow from them for this model.
        journal: the changes to the model.
        cross_tokens: the learned modules by place ("vision", "text", "video", "question"), also while ``keep_ratio=1``
            parks them.
        cross_paths: where they are registered in the model, by place.
        encoder_path: path to the module that holds the vision layers.
        text_path: path to the module that writes text cross tokens, "" where there is none.
        tower: state of the hooked vision tower; None where none is reduced, as while ``keep_ratio=1``.
        merge: state of the merging behind the projector in models whose tower is not reduced, or None.
        modality_towers: towers that single modalities have beside the vision tower, by the modality's name.
        second_merge: state of the merging behind a reduced tower: of pooled frames, resized grids and what a projector
            of the whole grid makes; or None.
        text_encoder_path, text_tower: the same for a text tower.
        vision_cache: encoded images for the next question about them, or None.
        adapter: what putting on an adapter that was saved with the settings has changed, or None.
        stage_layers: layers of the language model in front of which visual tokens leave.
        text_layers: number of the language model's layers, for methods that act in them.
    """

    method: Method
    family: Family
    geometry: Geometry
    schedule: Schedule
    journal: Journal
    cross_tokens: dict[str, nn.Module]
    cross_paths: dict[str, str] = field(default_factory=dict)
    encoder_path: str = ""
    text_path: str = ""
    tower: TowerState | None = None
    merge: MergeState | None = None
    modality_towers: dict[str, ModalityTower] = field(default_factory=dict)
    second_merge: MergeState | None = None
    text_encoder_path: str = ""
    text_tower: TextTowerState | None = None
    vision_cache: VisionCache | None = None
    adapter: TreeChange | None = None
    stage_layers: tuple[int, ...] = ()
    text_layers: int = 0

    @property
    def keeps_positions(self) -> bool:
        """True if tokens are to keep their positions in the full prompt; with positions in a grid they always do."""
        return (
            self.method.keeps_positions and bool(self.family.modalities) and self.family.positions is not Positions.GRID
        )

    @property
    def size_bias(self) -> bool:
        """Whether token sizes reach the language model's attention."""
        reduced = self.tower is not None or self.merge is not None
        return self.method.weighs_sizes and bool(self.family.modalities) and reduced

    @property
    def weighs_readers(self) -> bool:
        """Whether token sizes reach the modules that cross-attend to the tower."""
        return self.method.weighs_sizes and self.family.vision.is_read_across and self.tower is not None

    @property
    def tower_geometry(self) -> TowerGeometry:
        """The geometry of a vision tower. Raises ``TypeError`` where images are merged behind the projector alone."""
        if not isinstance(self.geometry, TowerGeometry):
            raise TypeError(f"family {self.family.key!r} merges behind its projector: no tower's geometry is known")
        return self.geometry

    @property
    def merging(self) -> MergeState | None:
        """State of the merging of every image's features behind the projector, or None."""
        if self.merge is not None:
            return self.merge
        geometry = self.geometry
        has_cells = isinstance(geometry, TowerGeometry) and (geometry.cells is not None or geometry.block > 1)
        return self.second_merge if has_cells else None


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT's wrapper, ``torch.compile``'s and those for data parallelism, or itself."""
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def wrapped_by_peft(model: nn.Module) -> bool:
    """Whether PEFT's wrapper is among those around the transformers model."""
    while (inner := _inside(model)) is not None:
        if hasattr(model, "get_base_model") and not _is_compiled(model):
            return True
        model = inner
    return False


def trains_in_parallel(model: nn.Module) -> bool:
    """Whether a wrapper that has looked at the parameters already is around the transformers model."""
    while (inner := _inside(model)) is not None:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return True
        model = inner
    return False


IN_PARALLEL = (
    "nn.DataParallel, which transformers' Trainer uses where one process sees several GPUs, is not supported by an "
    "accelerated model, whose replicas would share what a forward writes down; train with DistributedDataParallel, one "
    "process per GPU (torchrun --nproc_per_node N script.py, or accelerate launch script.py), or make a single GPU "
    "visible (CUDA_VISIBLE_DEVICES=0)"
)


def refuse_replica(model: nn.Module) -> None:
    """Raise ``RuntimeError`` for a replica that ``nn.DataParallel`` has made of an accelerated model."""
    if model.__dict__.get("_is_replica", False):
        raise RuntimeError(IN_PARALLEL)


def _inside(model: nn.Module) -> nn.Module | None:
    """What a wrapper that computes the same as its inside has inside; None for other modules."""
    if not isinstance(model, nn.Module):
        return None
    if _is_compiled(model):
        return model._modules["_orig_mod"]
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return model.module
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        inner: nn.Module = cast(Any, model).get_base_model()
        return inner
    return None


def _is_compiled(model: nn.Module) -> bool:
    """By name: importing its class takes seconds."""
    return type(model).__name__ == "OptimizedModule" and "_orig_mod" in model._modules


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of an accelerated model (also inside a wrapper, see ``base_model``), or None."""
    return vars(base_model(model)).get(HANDLE)


def accelerated_inside(model: nn.Module) -> str | None:
    """Path to an accelerated model inside a module that is none itself, or None."""
    return next((name for name, module in model.named_modules() if name and HANDLE in vars(module)), None)


def live_cross_tokens(model: nn.Module) -> dict[str, nn.Module]:
    """The cross tokens that an accelerated model computes with, by place.

    Looked up by path, because PEFT replaces the registered module (``modules_to_save``) and trains a copy of it.
    """
    target = base_model(model)
    handle: Handle = vars(target)[HANDLE]
    return {**handle.cross_tokens, **{place: module_at(target, path) for place, path in handle.cross_paths.items()}}
