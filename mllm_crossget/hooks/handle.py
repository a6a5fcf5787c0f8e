"""What an accelerated model carries: settings, counts, learned tokens and the way back."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from mllm_crossget.families.base import Family, module_at
from mllm_crossget.hooks.journal import Journal
from mllm_crossget.hooks.post_merge import MergeState
from mllm_crossget.hooks.text_tower import TextTowerState
from mllm_crossget.hooks.tower import TowerState
from mllm_crossget.hooks.vision_cache import VisionCache
from mllm_crossget.methods.base import Method
from mllm_crossget.schedule import Geometry, Schedule, TowerGeometry

HANDLE = "_mllm_crossget"


@dataclass
class OwnTower:
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
        cross_tokens: the learned modules by place ("vision", "text", "video"), also while ``keep_ratio=1`` parks them.
        cross_paths: where they are registered in the model, by place.
        encoder_path: path to the module that holds the vision layers.
        text_path: path to the module that writes text cross tokens, "" where there is none.
        tower: state of the hooked vision tower or of the merging behind the projector, None while ``keep_ratio=1``.
        own_towers: towers that single modalities have beside it, by the modality's name.
        again: state of the second merging, behind pooled frames, resized grids and projectors of the whole grid, or
            None.
        text_encoder_path, text_tower: the same for a text tower.
        vision_cache: encoded images for the next question about them, or None.
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
    tower: TowerState | MergeState | None = None
    own_towers: dict[str, OwnTower] = field(default_factory=dict)
    again: MergeState | None = None
    text_encoder_path: str = ""
    text_tower: TextTowerState | None = None
    vision_cache: VisionCache | None = None

    @property
    def keeps_positions(self) -> bool:
        """Whether image tokens and text keep positions of the full prompt that a grid does not give them anyway."""
        return self.method.keeps_positions and self.family.positions != "grid"

    @property
    def merging(self) -> MergeState | None:
        """State of the merging of every image's features behind the projector, or None."""
        if isinstance(self.tower, MergeState):
            return self.tower
        return self.again if isinstance(self.geometry, TowerGeometry) and self.geometry.cells is not None else None


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    if isinstance(model, nn.Module) and hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of an accelerated model (also inside a PEFT wrapper), or None."""
    return vars(base_model(model)).get(HANDLE)


def live_cross_tokens(model: nn.Module) -> dict[str, nn.Module]:
    """The cross tokens that an accelerated model computes with, by place.

    Looked up by path, because PEFT replaces the registered module (``modules_to_save``) and trains a copy of it.
    """
    target = base_model(model)
    handle: Handle = vars(target)[HANDLE]
    return {**handle.cross_tokens, **{place: module_at(target, path) for place, path in handle.cross_paths.items()}}
