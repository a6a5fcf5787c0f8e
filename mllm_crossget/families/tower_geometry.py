"""Geometries that several families share, made from a configuration: tower, number of patches, layer that is read."""

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
        kinds: supported kinds of towers.
        owner: the family's name in messages; "" for the configuration's class.
        part: path from the configuration to the vision configuration.
        drops_prefix: see ``TowerGeometry``.
        cells: configuration -> number of cells behind a projector that needs the whole grid; None if there is no such
            projector.

    Returns:
        configuration -> geometry; raises ``ValueError`` for another vision tower.
    """

    def geometry(config: Any) -> TowerGeometry:
        vision = config_at(config, part)
        prefix = tower_kind(vision.model_type, kinds, owner or type(config).__name__).prefix
        layers = vision.num_hidden_layers
        cell_count = None if cells is None else cells(config)
        return TowerGeometry(patches_per_image(vision), prefix, layers, layers, drops_prefix, cell_count)

    return geometry


def layers_that_are_read(given: Any, layers: int) -> list[int]:
    """For each part of the features, the layer whose output it is, counted from 1, in a tower of ``layers`` layers.

    Args:
        given: the configuration's ``vision_feature_layer``, one number or several.
        layers: number of layers of the tower.

    Raises:
        ValueError: a layer that the tower does not have, or the embeddings before the first layer.
    """
    read = [layer if layer >= 0 else layers + 1 + layer for layer in ([given] if isinstance(given, int) else given)]
    if not read or not all(1 <= layer <= layers for layer in read):
        raise ValueError(
            f"vision_feature_layer={given!r}: the vision tower has {layers} layers, of which each part of the features "
            f"must be one; use 1 to {layers}, or -{layers} to -1"
        )
    return read


def reads_several_layers(config: Any) -> bool:
    """Whether a model's features are concatenated from several layers of its tower."""
    feature_layer = config.vision_feature_layer
    return not isinstance(feature_layer, int) and len(feature_layer) > 1


def layer_that_is_read(layer: Any, layers: int) -> int:
    """The layer of ``vision_feature_layer``, counted from 1, of a tower of ``layers`` layers; it may be a list of one.

    Raises:
        ValueError: several layers, or a layer that the tower does not have.
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
    """The input of pixel shuffle for a cell whose patches are all one token: these patches, which it shuffles itself.

    Args:
        factor: name of the configuration's field with the number of patches per side of a cell.

    Returns:
        (configuration, (images, D) tokens) -> (images, factor², D).
    """

    def cell(config: Any, tokens: Tensor) -> Tensor:
        return tokens[:, None].repeat(1, getattr(config, factor) ** 2, 1)

    return cell
