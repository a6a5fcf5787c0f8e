"""A family is data in named parts, and what it needs is named by things that exist."""

from __future__ import annotations

import dataclasses

import pytest

from mllm_crossget.families.family import Family, FeatureKind, Positions, TowerKind, families
from mllm_crossget.hooks.projector.features import FeaturesMixin
from mllm_crossget.hooks.projector.kinds import MIXINS

EVERY = pytest.mark.parametrize("family", families().values(), ids=lambda family: family.key)


@EVERY
def test_references_are_typed(family: Family) -> None:
    """A misspelt name fails where the family's file is imported, not when a model is accelerated."""
    assert isinstance(family.prompt.kind, FeatureKind)
    assert isinstance(family.prompt.positions, Positions)
    assert all(isinstance(kind, TowerKind) for kind in family.vision.kinds)
    assert family.towers == tuple(kind.model_type for kind in family.vision.kinds)


@EVERY
def test_what_is_in_a_part_can_be_read_from_the_family(family: Family) -> None:
    """By the names of version 0.1."""
    assert len(dataclasses.fields(family)) == 10
    assert (family.tower, family.vision_config) == (family.vision.tower, family.vision.config)
    assert (family.note, family.exact) == (family.docs.note, family.docs.exact)
    assert family.features is family.prompt.kind
    assert family.features_owner == family.prompt.owner
    assert family.language_model == family.language.model
    assert family.connector_flops is family.costs.connector
    assert family.vision_projection == family.crossing.vision


def test_every_kind_of_features_has_a_mixin() -> None:
    assert set(MIXINS) == set(FeatureKind)
    assert all(issubclass(mixin, FeaturesMixin) for mixin in MIXINS.values())


def test_kinds_are_the_names_that_they_were() -> None:
    """They are strings too."""
    assert families()["llava"].features == "plain"
    assert families()["qwen2_vl"].positions == "grid"
