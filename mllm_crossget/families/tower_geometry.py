"""Geometries that several families share, made from a configuration: which tower, how many patches, what is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mllm_crossget.families.tower_kinds import TowerKind, config_at, patches_per_image, tower_kind
from mllm_crossget.schedule import TowerGeometry


def read_at_the_end(
    *kinds: TowerKind,
    owner: str = "",
    part: str = "vision_config",
    drops_prefix: bool = True,
    cells: Callable[[Any], int] | None = None,
) -> Callable[[Any], TowerGeometry]:
    """Geometry of a family that reads the last layer of its tower.

    Args:
        kinds: of towers that are served.
        owner: the family's name in messages; "" for the configuration's class.
        part: path from the configuration to the vision configuration.
        drops_prefix: see ``TowerGeometry``.
        cells: configuration -> cells behind a projector of the whole grid; None where there is no such projector.

    Returns:
        configuration -> geometry; raises ``ValueError`` for another vision tower.
    """

    def geometry(config: Any) -> TowerGeometry:
        vision = config_at(config, part)
        prefix = tower_kind(vision.model_type, kinds, owner or type(config).__name__).prefix
        layers = vision.num_hidden_layers
        made = None if cells is None else cells(config)
        return TowerGeometry(patches_per_image(vision), prefix, layers, layers, drops_prefix, made)

    return geometry


def layers_that_are_read(given: Any, layers: int) -> list[int]:
    """Layers that have run when each part of the features is read, counted from 1, of a tower of so many.

    Args:
        given: the configuration's ``vision_feature_layer``, one number or several.
        layers: of the tower.

    Raises:
        ValueError: a layer that the tower has not, or the embeddings in front of the first one.
    """
    read = [layer if layer >= 0 else layers + 1 + layer for layer in ([given] if isinstance(given, int) else given)]
    if not read or not all(1 <= layer <= layers for layer in read):
        raise ValueError(
            f"vision_feature_layer={given!r}: the vision tower has {layers} layers, of which each part of the features "
            f"must be one; use 1 to {layers}, or -{layers} to -1"
        )
    return read


def reads_several_layers(config: Any) -> bool:
    """Whether a model's features are several layers of its tower side by side."""
    given = config.vision_feature_layer
    return not isinstance(given, int) and len(given) > 1


def layer_that_is_read(layer: Any, layers: int) -> int:
    """Layers that have run at ``vision_feature_layer`` in a tower of so many; a list of one layer means that layer.

    Raises:
        ValueError: several layers, or none of the tower's.
    """
    if not isinstance(layer, int) and len(layer) == 1:
        (layer,) = layer
    if not isinstance(layer, int):
        raise ValueError(
            f"vision_feature_layer={layer!r}: features of several layers are concatenated token by token, and merged "
            "layers have different numbers of tokens; use a single layer, such as -2"
        )
    read = layer if layer >= 0 else layers + 1 + layer
    if not 1 <= read <= layers:
        raise ValueError(
            f"vision_feature_layer={layer} is outside the {layers} layers of the vision tower, or in front of the "
            f"first one, where nothing is merged yet; use -{layers} to -1"
        )
    return read


def cell_of_patches(factor: str) -> Callable[[Any, Tensor], Tensor]:
    """What pixel shuffle takes for a cell all of whose patches are one token: these patches, which it shuffles itself.

    Args:
        factor: name of the configuration's field with the patches along a side of a cell.

    Returns:
        (configuration, (images, D) tokens) -> (images, factor², D).
    """

    def cell(config: Any, tokens: Tensor) -> Tensor:
        return tokens[:, None].repeat(1, getattr(config, factor) ** 2, 1)

    return cell
