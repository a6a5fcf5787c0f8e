"""What others' methods choose, worked out by arithmetic from their published formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mllm_crossget.config import method_class
from mllm_crossget.methods import Signals
from mllm_crossget.methods.rivals import (
    CdPrunerConfig,
    DivPruneConfig,
    FasterVlmConfig,
    FsrConfig,
    HiPruneConfig,
    HiRedConfig,
    HoloVConfig,
    PiToMeConfig,
    PoolingConfig,
    PruMergeConfig,
    PruMergePlusConfig,
    RandomOutputConfig,
    ScopeConfig,
    UniformConfig,
    VisionZipConfig,
    VisPrunerConfig,
)
from mllm_crossget.methods.signals import AskedText, NextLayer
from mllm_crossget.ops import merge
from mllm_crossget.ops.blocks import block_of_patches, middle_of_blocks
from mllm_crossget.ops.greedy import coverage_first, determinantal_first, farthest_after, without_duplicates


def at_angles(*degrees: float) -> Tensor:
    """(1, N, 2) vectors of length 1, whose cosines are those of the differences of the angles."""
    angles = torch.tensor([degrees], dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def signals(count: int, **given: Any) -> Signals:
    """Signals of one image of so many patches behind a class token, which attention pays nothing here."""
    made = Signals(torch.zeros(1, 1 + count, 2), None, (0,))
    for name, values in given.items():
        value = torch.as_tensor(values, dtype=torch.float32)
        value = value if value.shape[0] == 1 and value.ndim > 1 else value[None]
        setattr(made, name, torch.cat([value[:, :1] * 0 + 9, value], dim=1))
    return made


def kept_patches(match: Any) -> list[int]:
    """Patches that stay, in the order of the output."""
    return [place - 1 for place in match.kept[0].tolist()[1:]]


def one_hot_rows(match: Any, tokens: int) -> Tensor:
    """(outputs, patches) of what every output is made."""
    made, _ = merge(torch.eye(tokens)[None], torch.ones(1, tokens), match)
    return made[0, 1:, 1:]


@pytest.mark.parametrize("kind", [FasterVlmConfig, HiRedConfig])
def test_class_attention_keeps_the_most_attended_and_the_first_of_equals(kind) -> None:
    match = kind().match(signals(5, salience=[0.1, 0.3, 0.2, 0.3, 0.2]), 2)
    assert kept_patches(match) == [1, 2, 3]
    assert match.pruned


def test_visionzip() -> None:
    """Dominant: 0 and 2. Others 1 3 4 5 6 7; every third is a target: 1 (0°) and 5 (90°). 3 (10°) and 6 (30°) go into
    1, 4 (80°) and 7 (50°) into 5. A contextual token is its target plus the mean of the others."""
    given = signals(8, salience=[8, 1, 7, 1, 1, 2, 1, 1], keys=at_angles(200, 0, 300, 10, 80, 90, 30, 50))
    match = VisionZipConfig(contextual=0.5).match(given, 4)
    assert kept_patches(match) == [0, 1, 2, 5]
    rows = one_hot_rows(match, 9)
    expected = torch.zeros(4, 8)
    expected[0, 0] = expected[2, 2] = expected[1, 1] = expected[3, 5] = 1
    expected[1, [3, 6]] = expected[3, [4, 7]] = 0.5
    torch.testing.assert_close(rows, expected)
    assert merge(torch.zeros(1, 9, 1), torch.ones(1, 9), match)[1].tolist() == [[1, 1, 3, 1, 3]]
    published = VisionZipConfig(contextual=0.5, order="published").match(given, 4)
    assert kept_patches(published) == [0, 2, 1, 5]
    torch.testing.assert_close(one_hot_rows(published, 9), expected[[0, 2, 1, 3]])


def test_visionzip_shares_and_targets_without_tokens() -> None:
    """54 + 10, 108 + 20 and 162 + 30 as published; a target that nothing goes into stays as it is."""
    for kept, contextual in ((64, 10), (128, 20), (192, 30)):
        assert round(VisionZipConfig().contextual * kept) == contextual
    given = signals(5, salience=[5, 4, 1, 1, 1], keys=at_angles(0, 9, 0, 90, 9))
    match = VisionZipConfig(contextual=0.5).match(given, 1)
    rows = one_hot_rows(match, 6)  # others 2, 3 and 4, two targets: 2, which takes 4, and 3
    assert rows.tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 1], [0, 0, 0, 1, 0]]
    alone = VisionZipConfig(contextual=0.0).match(signals(3, salience=[3, 2, 1], keys=at_angles(0, 9, 8)), 1)
    assert one_hot_rows(alone, 4).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert alone.slot.tolist() == [[0, 1, 2, 2]]


def test_prumerge() -> None:
    """Kept: 0 and 1. With one neighbour each: 2 is nearest to 0, 3 to 1. The last token is 0.2 x2 + 0.1 x3."""
    given = Signals(torch.zeros(1, 5, 2), None, (0,))
    keys = torch.cat([torch.ones(1, 1, 2), at_angles(0, 90, 10, 80)], dim=1)
    given.following = NextLayer(torch.tensor([[0.0, 0.4, 0.3, 0.2, 0.1]]), keys)
    match = PruMergeConfig(neighbours=1).match(given, 1)
    expected = torch.tensor([[1, 0, 0.2, 0], [0, 1, 0, 0.1], [0, 0, 0.2, 0.1]])
    torch.testing.assert_close(one_hot_rows(match, 5), expected)
    assert kept_patches(match) == [0, 1, 3]
    assert match.slot.tolist() == [[0, 1, 2, 1, 3]]
    one = PruMergeConfig().match(given, 3)
    torch.testing.assert_close(one_hot_rows(one, 5), torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    many = PruMergeConfig().match(given, 2)  # 32 neighbours are all others, kept or not
    torch.testing.assert_close(one_hot_rows(many, 5)[0], torch.tensor([1, 0.3, 0.2, 0.1]))
    assert many.slot.tolist() == [[0, 1, 1, 1, 2]]


def test_prumerge_plus_keeps_half_at_equal_distances() -> None:
    """Of 16 patches 9 tokens: 4 in the middles of the quarters, 4 by attention, one for the rest."""
    attention = torch.tensor([[0.0, *(1 / (2 + place) for place in range(16))]])
    given = Signals(torch.zeros(1, 17, 2), None, (0,), following=NextLayer(attention, torch.randn(1, 17, 3)))
    assert middle_of_blocks(16, 4) == (0, 2, 8, 10)
    kept = kept_patches(PruMergePlusConfig().match(given, 7))
    assert kept == [0, 1, 2, 3, 4, 5, 8, 10, 15]


def test_divprune() -> None:
    """Nearest neighbours are 10°, 10°, 40° and 130° away: 180° comes first, then 0°, then 50° (50° from 0°)."""
    features = at_angles(0, 10, 50, 180)
    for kept, expected in ((1, [3]), (2, [0, 3]), (3, [0, 2, 3])):
        match = DivPruneConfig().match(Signals(features, None, ()), 4 - kept)
        assert match.kept.tolist() == [expected]


def test_divprune_takes_no_duplicate_twice() -> None:
    match = DivPruneConfig().match(Signals(at_angles(0, 0, 0, 90), None, ()), 1)
    assert match.kept.tolist() == [[0, 1, 3]]


# Relevance 1, 0.8, 0.7 and 0 (the third axis is the question's, negated), and no two features alike but for that.
CONDITIONED = [[0, 0, 1.0], [0.6, 0, 0.8], [0, math.sqrt(0.51), 0.7], [1.0, 0, 0]]


def asking(features: list[list[float]], negated: bool = True, relevance: list[float] | None = None) -> Signals:
    question = torch.tensor(relevance or [0.0, 0, -1.0 if negated else 1.0])
    words = torch.stack([question, torch.full_like(question, 5.0)])[None]  # the second one is padding
    return Signals(torch.tensor([features]), None, (), text=AskedText(words, torch.tensor([[True, False]])))


@pytest.mark.parametrize("negated", [True, False])
def test_cdpruner(negated) -> None:
    """q = 1, 0.8, 0.7, 0. First 0 with variance 1. It leaves 0.64 - (0.8 · 0.8)² = 0.2304 of 1, and 0.49 - (0.7 · 0.7)²
    = 0.2499 of 2, which is next although less relevant. Token 3 is relevant for nothing and last."""
    for kept, expected in ((1, [0]), (2, [0, 2]), (3, [0, 1, 2])):
        match = CdPrunerConfig(negated=negated).match(asking(CONDITIONED, negated), 4 - kept)
        assert match.kept.tolist() == [expected]


def test_determinants_are_as_large_as_greedy_can_make_them() -> None:
    """Every next token is the one that makes the determinant of the chosen kernel largest, worked out by
    determinants."""
    torch.manual_seed(0)
    keys, quality = torch.randn(3, 9, 12), torch.rand(3, 9)
    found = determinantal_first(keys, quality, 6)
    unit = torch.nn.functional.normalize(keys.double(), dim=-1)
    for row in range(3):
        kernel = quality[row].double()[:, None] * (unit[row] @ unit[row].T) * quality[row].double()
        chosen: list[int] = []
        for _ in range(6):
            others = [token for token in range(9) if token not in chosen]
            chosen.append(max(others, key=lambda one, c=chosen: torch.det(kernel[[*c, one]][:, [*c, one]]).item()))
        assert found[row].tolist() == chosen


def test_vispruner() -> None:
    """Ten of twelve: five by attention; of the seven others two leave. Even places of their list are 5°, 60°, 100° and
    200°, odd ones 0°, 90° and 180°; the nearest pairs are 5°-0° and 100°-90°."""
    rest = (5, 0, 60, 90, 100, 180, 200)
    match = VisPrunerConfig().match(
        signals(12, salience=[20.0 - place for place in range(12)], features=at_angles(0, 0, 0, 0, 0, *rest)), 2
    )
    assert kept_patches(match) == [0, 1, 2, 3, 4, 6, 7, 8, 10, 11]


def test_vispruner_of_an_odd_list_and_over_rounds() -> None:
    """13 in a list, eight at once: the seven even places leave, then the three even ones of six: places 3, 7, 11."""
    order = torch.arange(13)[None]
    assert without_duplicates(torch.randn(1, 13, 4), order, 3, 8).tolist() == [[3, 7, 11]]
    # One leaves: the even place at 0°, most like 1°; then the others by similarity (88° to 90°), and the odd ones.
    features = at_angles(45, 90, 88, 1, 0)
    assert without_duplicates(features, torch.arange(5)[None], 4, 1).tolist() == [[2, 0, 1, 3]]
    assert without_duplicates(features, torch.arange(5)[None], 5, 8).tolist() == [[0, 1, 2, 3, 4]]


def test_scope() -> None:
    """Three equal patches and one other. Gains 3, 3, 3, 1 times attention 0.25, 0.3, 0.1, 0.05: 1 comes first. Then
    only 3 adds to the coverage, whatever its attention; by attention alone it would be 0."""
    given = signals(4, salience=[0.25, 0.3, 0.1, 0.05], features=at_angles(0, 0, 0, 90))
    for kept, expected in ((1, [1]), (2, [1, 3]), (3, [0, 1, 3])):
        assert kept_patches(ScopeConfig().match(given, 4 - kept)) == expected
    # Added up: 3.25, 3.3, 3.1, 1.05; then 0.25, 0.1 and 1.05.
    assert kept_patches(ScopeConfig(combined="sum").match(given, 2)) == [1, 3]
    # Attention to the power of 0 does not count: the first of three equal gains, then the other.
    assert kept_patches(ScopeConfig(power=0.0).match(given, 2)) == [0, 3]


def test_scope_counts_no_negative_cosine() -> None:
    """At 0° and 180°: each covers itself alone, gain 1, not 1 - 1."""
    assert coverage_first(at_angles(0, 180), torch.tensor([[0.4, 0.5]]), 1).tolist() == [[1]]
    # 0° and 60° cover 1.5 each, 180° with 120° the same; weights decide, then what is left: 0.5 of 60° or 1.5.
    assert coverage_first(at_angles(0, 60, 180, 240), torch.tensor([[2.0, 1, 1.1, 1]]), 2).tolist() == [[0, 2]]


def test_holov_shares_by_attention_and_hands_on_what_has_no_room() -> None:
    """16 parts of two orthogonal patches: no variance, so shares are mean attention. Part 0 has 0.8 of it and is owed
    three of four tokens, but has two; one more goes to part 3, and the last to part 5."""
    attention = torch.full((32,), 0.001)
    attention[[0, 1, 6, 7, 10, 11]] = torch.tensor([0.5, 0.3, 0.05, 0.06, 0.03, 0.02])
    given = Signals(torch.eye(32)[None], None, (), salience=attention[None])
    assert HoloVConfig().match(given, 28).kept.tolist() == [[0, 1, 7, 10]]


def test_holov_gives_more_to_what_varies() -> None:
    """Equal attention; of 32 patches only part 15 has cosines that differ (0.6 to one another, 0 to themselves): scale
    times variance 0.36 is its whole share beside the attention."""
    keys = torch.eye(32)[None].clone()
    keys[0, 31] = 0.8 * keys[0, 31] + 0.6 * keys[0, 30]
    given = Signals(keys, None, (), salience=torch.full((1, 32), 1 / 32))
    assert 30 in HoloVConfig().match(given, 31).kept[0].tolist()
    assert HoloVConfig(parts="blocks").match(Signals(torch.eye(64)[None], None, (), salience=torch.rand(1, 64)),
                                             32).kept.shape == (1, 32)  # fmt: skip


def test_hiprune() -> None:
    """Six tokens: one anchor, 5, and its neighbours 1, 4, 6 and 9 in the 4 x 4 grid; the sixth by the late layer."""
    middle, late = torch.full((16,), 0.01), torch.full((16,), 0.02)
    middle[5], late[14] = 0.5, 0.5
    given = signals(16, middle=middle, importance=late)
    assert kept_patches(HiPruneConfig().match(given, 10)) == [1, 4, 5, 6, 9, 14]
    middle[5], middle[3] = 0.01, 0.5  # at the rim: 2 and 7, but not 4 in the next row
    given = signals(16, middle=middle, importance=late)
    assert kept_patches(HiPruneConfig().match(given, 10)) == [0, 1, 2, 3, 7, 14]
    assert kept_patches(HiPruneConfig().match(given, 12)) == [0, 1, 2, 14]  # below five tokens no anchor


def test_fsr() -> None:
    """Evidence 1, 0.06, 0, 0.004 (relevance³ · attention): 0 holds nine tenths. 90° is farthest and scanned; one token
    is refined into it, the one nearest to a scan token: 80°, with evidence 0.004 against 0.06."""
    features = [[1.0, 0], [0, 1.0], [math.cos(0.1), math.sin(0.1)], [math.cos(1.4), math.sin(1.4)]]
    given = asking(features, relevance=[1.0, 1.0])
    given.salience = torch.tensor([[1.0, 0.06, 0.0, 0.004]])
    match = FsrConfig(relevance_power=0.0).match(given, 2)
    rows = merge(torch.eye(4)[None], torch.ones(1, 4), match)[0][0]
    assert match.kept.tolist() == [[0, 1]]
    torch.testing.assert_close(rows, torch.tensor([[1, 0, 0, 0], [0, 0.06 / 0.064, 0, 0.004 / 0.064]]))
    assert match.slot.tolist() == [[0, 1, 0, 1]]


def test_fsr_relevance_is_cubed_and_the_focus_may_take_all() -> None:
    """Relevance 1 and 0.8 with attention 0.6 and 1: cubed 0.6 against 0.512, so 0 comes first, and both are focus."""
    given = asking([[0, 1.0], [0.6, 0.8], [1.0, 0]], relevance=[0.0, -1.0])
    given.salience = torch.tensor([[0.6, 1.0, 0.0]])
    one = FsrConfig().match(given, 2)
    assert one.kept.tolist() == [[0]]
    assert FsrConfig(relevance_power=1.0).match(given, 2).kept.tolist() == [[1]]
    both = FsrConfig().match(given, 1)
    assert merge(torch.eye(3)[None], torch.ones(1, 3), both)[0].tolist() == [[[1, 0, 0], [0, 1, 0]]]


def test_farthest_after_what_is_given() -> None:
    order, given = torch.tensor([[1, 0, 2, 3], [1, 0, 2, 3]]), torch.tensor([1, 2])
    features = at_angles(0, 10, 100, 190).expand(2, -1, -1)
    assert farthest_after(features, order, given, 3).tolist() == [[1, 3, 2], [1, 0, 3]]


def test_pitome() -> None:
    """Three equal tokens are crowded, three orthogonal ones stand alone and are protected: 0 goes into 1."""
    keys = torch.eye(6)[None, :, :].clone()
    keys[0, 1] = keys[0, 2] = keys[0, 0]
    match = PiToMeConfig().match(Signals(torch.cat([torch.ones(1, 1, 6), keys], dim=1), None, (0,)), 1)
    assert (match.src.tolist(), match.dst.tolist()) == ([[1]], [[2]])
    assert match.kept.tolist() == [[0, 2, 3, 4, 5, 6]]
    with pytest.raises(ValueError, match="half of the unprotected"):
        PiToMeConfig().match(Signals(keys, None, ()), 4)


def test_pitome_margin_falls_with_depth() -> None:
    """Token 0 has one partner at cosine 0.99, token 2 two at 0.5, all others are orthogonal. With margin 0.9 the sums
    of ELU are 0.1 + 0.09 - 3 · 0.593 = -1.59 and 0.1 - 2 · 0.330 - 2 · 0.593 = -1.75; with margin 0 they are 1.99 and
    2."""
    gram = torch.eye(5).double()
    gram[0, 1] = gram[1, 0] = 0.99
    for one, other in ((2, 3), (2, 4), (3, 4)):
        gram[one, other] = gram[other, one] = 0.5
    keys = torch.linalg.cholesky(gram).float()[None]
    assert PiToMeConfig().match(Signals(keys, None, (), depth=0.0), 1).src.tolist() == [[0]]
    assert PiToMeConfig().match(Signals(keys, None, (), depth=1.0), 1).src.tolist() == [[2]]


def test_pooling_and_uniform_choice_go_by_the_grid() -> None:
    given = signals(16)
    match = PoolingConfig().match(given, 12)
    rows = one_hot_rows(match, 17)
    quarter = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert [row.nonzero()[:, 0].tolist() for row in rows] == quarter
    torch.testing.assert_close(rows.sum(dim=1), torch.ones(4))
    assert kept_patches(UniformConfig().match(given, 12)) == [0, 2, 8, 10]
    assert kept_patches(UniformConfig().match(signals(9), 8)) == [4]


@pytest.mark.parametrize("patches", [1, 7, 16, 144])
def test_blocks_are_as_many_as_asked_for_none_empty_and_nearly_equal(patches) -> None:
    for blocks in range(1, patches + 1):
        place = block_of_patches(patches, blocks)
        sizes = [place.count(block) for block in range(blocks)]
        assert min(sizes) >= 1
        assert sum(sizes) == patches
        assert max(sizes) <= 4 * math.ceil(patches / blocks)
        middles = middle_of_blocks(patches, blocks)
        assert [place[patch] for patch in middles] == list(range(blocks))
    for wrong in (0, patches + 1):
        with pytest.raises(ValueError, match=f"1 to {patches} blocks"):
            block_of_patches(patches, wrong)


def test_random_choice_is_the_seeds_and_fewer_are_a_part_of_more() -> None:
    given = signals(16)
    few, many = (set(kept_patches(RandomOutputConfig(seed=1).match(given, r))) for r in (12, 6))
    assert few < many
    assert few != set(kept_patches(RandomOutputConfig(seed=2).match(given, 12)))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("visionzip", {"contextual": 1.0}),
        ("visionzip", {"order": "raster"}),
        ("vispruner", {"important": 1.5}),
        ("scope", {"combined": "max"}),
        ("scope", {"power": -1.0}),
        ("prumerge", {"neighbours": -1}),
        ("hiprune", {"anchors": 2.0}),
        ("holov", {"parts": "tiles"}),
        ("fsr", {"relevance_power": -1.0}),
        ("random-output", {"seed": -1}),
    ],
)
def test_settings_out_of_range_are_refused(method, settings) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name} must be"):
        method_class(method)(**settings)
