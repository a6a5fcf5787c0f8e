"""From the dial to counts: the published numbers, exact targets, limits."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mllm_crossget import CrossGetConfig, MadtpConfig, RandomConfig, ToMeConfig
from mllm_crossget.arithmetic.geometry import TowerCosts
from mllm_crossget.config import Place, method_class, method_names
from mllm_crossget.families.llava import geometry as llava_geometry
from mllm_crossget.schedule import MergeGeometry, TowerGeometry, make_schedule, ramp, removable
from tests.helpers import reference
from tests.helpers.methods import OWN
from tests.helpers.tiny import tiny_llava

LLAVA_15 = TowerGeometry(patches=576, prefix=1, layers=24, read=23)
HALF, TWO_FIFTHS = Fraction(1, 2), Fraction(2, 5)
PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def geometries(draw):
    layers = draw(st.integers(1, 12))
    read = draw(st.integers(1, layers))
    prefix = draw(st.integers(0, 1))
    return TowerGeometry(draw(st.integers(1, 200)), prefix, layers, read, draw(st.booleans()) and prefix == 1)


def test_the_published_setting():
    schedule = make_schedule(CrossGetConfig(r=13), LLAVA_15)
    assert schedule.tokens[0] == 578
    assert schedule.tokens[23] == 279
    assert schedule.tokens[24] == 266
    assert schedule.features == 278
    assert schedule.placeholders == 576
    assert schedule.removals == (13,) * 24
    assert schedule.cross
    assert not schedule.drop_cross
    assert list(schedule.tokens) == reference.token_counts(576, 1, 24, 13, cross=True)


@PROPERTY
@given(geometries(), st.integers(0, 200), st.sampled_from(["crossget", "tome", "random"]))
def test_constant_r_equals_the_oracle(geometry, r, name):
    r = min(r, geometry.patches)
    config = method_class(name)(r=r)
    schedule = make_schedule(config, geometry)
    cross = config.uses_cross_tokens
    assert list(schedule.tokens) == reference.token_counts(geometry.patches, geometry.prefix, geometry.layers, r, cross)
    assert [a - b for a, b in zip(schedule.tokens[:-1], schedule.tokens[1:], strict=True)] == list(schedule.removals)
    read = schedule.tokens[geometry.read] - (geometry.prefix if geometry.drops_prefix else 0)
    assert schedule.features == min(read, geometry.placeholders) or not cross
    assert schedule.features <= geometry.placeholders


def least_features(geometry: TowerGeometry, cross: bool) -> int:
    tokens = reference.token_counts(geometry.patches, geometry.prefix, geometry.read, 10**6, cross)[-1]
    return tokens - (geometry.prefix if geometry.drops_prefix else 0)


@PROPERTY
@given(geometries(), st.integers(1, 201), st.sampled_from(OWN))
def test_visual_tokens_are_met_exactly_or_refused_with_the_least(geometry, target, name):
    target = min(target, geometry.placeholders)
    config = method_class(name)(visual_tokens=target)
    least = least_features(geometry, config.uses_cross_tokens)
    if target < least:
        says = rf"visual_tokens>={least}\b" if least <= geometry.placeholders else "no room for a cross token"
        with pytest.raises(ValueError, match=rf"{target} visual tokens.*{says}"):
            make_schedule(config, geometry)
        return
    schedule = make_schedule(config, geometry)
    assert schedule.features == target
    assert len(schedule.removals) == geometry.layers
    assert not any(schedule.removals[geometry.read :])
    # even: all layers but those that cannot give more, and the last that finishes the count, remove the same
    largest = max(schedule.removals)
    protected = geometry.prefix + config.uses_cross_tokens
    share = TWO_FIFTHS if config.is_dynamic and with_room(geometry, protected) <= target else HALF
    rest = [i for i, removed in enumerate(schedule.removals[: geometry.read])
            if removed < min(largest, removable(schedule.tokens[i], protected, share))]  # fmt: skip
    assert len([i for i in rest if schedule.removals[i]]) <= 1


def with_room(geometry: TowerGeometry, protected: int) -> int:
    """Fewest features where every layer removes two fifths of what may leave."""
    tokens = geometry.patches + protected
    for _ in range(geometry.read):
        tokens -= (tokens - protected) * 2 // 5
    return tokens - (geometry.prefix if geometry.drops_prefix else 0)


@PROPERTY
@given(geometries(), st.integers(1, 201), st.booleans())
def test_where_images_differ_no_layer_is_asked_for_more_than_two_fifths(geometry, target, cross):
    """A layer takes at most half of an image's tokens; asked for half on average, it could not make up for those
    images that lose less."""
    kind = CrossGetConfig if cross else MadtpConfig
    target = max(with_room(geometry, geometry.prefix + cross), min(target, geometry.placeholders))
    if target > geometry.placeholders:
        return  # a cross token more than there are placeholders
    config = kind(visual_tokens=target, **({"dynamic": True} if cross else {}))
    schedule = make_schedule(config, geometry)
    assert schedule.features == target
    protected = geometry.prefix + cross
    assert all(5 * removed <= 2 * (tokens - protected)
               for removed, tokens in zip(schedule.removals, schedule.tokens[:-1], strict=True))  # fmt: skip


def test_one_eighth_of_the_embedded_models_tokens():
    """The case that missed its average: the last layer was asked for half of 36 patches."""
    geometry = TowerGeometry(patches=144, prefix=1, layers=8, read=7)
    assert make_schedule(ToMeConfig(keep_ratio=0.125), geometry).removals == (18,) * 7 + (0,)
    assert make_schedule(MadtpConfig(keep_ratio=0.125), geometry).removals == (19,) * 6 + (12, 0)


@PROPERTY
@given(geometries(), st.floats(0.01, 0.999), st.sampled_from(OWN))
def test_keep_ratio_means_the_same_for_every_method(geometry, ratio, name):
    config = method_class(name)(keep_ratio=ratio)
    target = max(1, round(ratio * geometry.placeholders))
    if target < least_features(geometry, config.uses_cross_tokens):
        with pytest.raises(ValueError, match="cannot be reached"):
            make_schedule(config, geometry)
    else:
        assert make_schedule(config, geometry).features == target


@pytest.mark.parametrize("name", method_names())
def test_default_is_half(name):
    """Inside the language model it is half of what enters: ``tests/arithmetic/test_language_stages.py``."""
    whole = method_class(name).place is Place.LANGUAGE_MODEL
    assert make_schedule(method_class(name)(), LLAVA_15).features == (576 if whole else 288)


@pytest.mark.parametrize("kind", [CrossGetConfig, ToMeConfig, RandomConfig])
def test_keep_everything_changes_no_count(kind):
    schedule = make_schedule(kind(keep_ratio=1.0), LLAVA_15)
    assert schedule.features == schedule.placeholders == 576
    assert set(schedule.tokens) == {577}
    assert not schedule.cross


def test_a_cross_token_that_does_not_fit_is_cut_off():
    schedule = make_schedule(CrossGetConfig(r=0), LLAVA_15)
    assert schedule.tokens[23] == 578
    assert schedule.drop_cross
    assert schedule.features == 576
    one = make_schedule(CrossGetConfig(r=[1] + [0] * 23), LLAVA_15)
    assert not one.drop_cross
    assert one.features == 576


def test_one_r_per_layer_is_clipped_layer_by_layer():
    geometry = TowerGeometry(patches=16, prefix=1, layers=4, read=3)
    schedule = make_schedule(CrossGetConfig(r=[0, 16, 2, 9]), geometry)
    assert schedule.removals == (0, 8, 2, 3)
    assert schedule.tokens == (18, 18, 10, 8, 5)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CrossGetConfig(r=[1, 2, 3]), ["3 layers", "24", "one integer per layer"]),
        (CrossGetConfig(r=577), ["r=577", "576", "288"]),
        (CrossGetConfig(visual_tokens=577), ["visual_tokens=577", "576", "keep_ratio=1"]),
    ],
)
def test_a_dial_that_does_not_fit_the_tower_is_refused(config, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked one by one
        make_schedule(config, LLAVA_15)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"keep_ratio": 0.5, "r": 3}, ValueError, ["keep_ratio=0.5", "r=3", "exactly one"]),
        ({"keep_ratio": 0.0}, ValueError, ["(0, 1]", "0.0"]),
        ({"keep_ratio": 1.5}, ValueError, ["(0, 1]", "1.5"]),
        ({"keep_ratio": float("nan")}, ValueError, ["nan"]),
        ({"keep_ratio": "half"}, TypeError, ["half"]),
        ({"keep_ratio": True}, TypeError, ["True"]),
        ({"visual_tokens": 0}, ValueError, ["at least 1", "0"]),
        ({"visual_tokens": 3.0}, TypeError, ["integer", "3.0"]),
        ({"r": -1}, ValueError, ["at least 0", "-1"]),
        ({"r": []}, ValueError, ["empty"]),
        ({"r": [1, -2]}, ValueError, ["r[1]", "-2"]),
        ({"r": "13"}, TypeError, ["integer", "13"]),
    ],
)
@pytest.mark.parametrize("name", method_names())
def test_a_bad_dial_is_refused_when_the_settings_are_made(settings, kind, words, name):
    with pytest.raises(kind) as error:
        method_class(name)(**settings)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(("tokens", "protected", "most"), [(578, 2, 288), (3, 2, 0), (2, 2, 0), (1, 2, 0), (7, 0, 3)])
def test_removable(tokens, protected, most):
    assert removable(tokens, protected) == most


@pytest.mark.parametrize(
    ("settings", "features"),
    [
        ({"tower": "clip"}, 16),
        ({"tower": "clip", "strategy": "full"}, 17),
        ({"tower": "siglip"}, 16),
        ({"tower": "clip", "image_size": 84}, 36),
        ({"tower": "clip", "feature_layer": 1}, 16),
    ],
)
def test_placeholders_equal_what_the_untouched_model_makes(settings, features):
    model = tiny_llava(**settings)
    geometry = llava_geometry(model.config)
    size = model.config.vision_config.image_size
    made = model.get_image_features(pixel_values=torch.randn(1, 3, size, size)).pooler_output[0]
    assert geometry.placeholders == len(made) == features


@pytest.mark.parametrize(
    ("layers", "r", "inflect", "expected"),
    [
        (4, 6, 0.0, [6, 6, 6, 6]),
        (4, 6, -1.0, [12, 8, 4, 0]),
        (4, 6, 1.0, [0, 4, 8, 12]),
        (4, [3, 2], 0.0, [3, 2, 0, 0]),
    ],
)
def test_ramps_fall_rise_and_fill_up(layers, r, inflect, expected):
    assert ramp(layers, r, inflect) == expected


def test_ramps_refuse_what_they_cannot_express():
    with pytest.raises(ValueError, match="inflect must be in"):
        ramp(4, 6, 2.0)
    with pytest.raises(ValueError, match="at most 4 integers"):
        ramp(4, [1] * 5)


@pytest.mark.parametrize("every", [1, 2, 3, 24])
def test_merging_in_every_nth_layer_reaches_the_same_number(every):
    geometry = TowerGeometry(patches=576, prefix=1, layers=24, read=23)
    schedule = make_schedule(CrossGetConfig(visual_tokens=300, merge_every=every), geometry)
    assert schedule.features == 300
    assert sum(schedule.removals) == 577 - 300
    assert all(removed == 0 for layer, removed in enumerate(schedule.removals) if layer % every)
    by_r = make_schedule(CrossGetConfig(r=5, merge_every=every), geometry)
    assert by_r.removals == tuple(5 if layer % every == 0 else 0 for layer in range(24))


def test_merge_every_is_refused_where_it_says_nothing():
    geometry = TowerGeometry(patches=64, prefix=1, layers=4, read=4)
    with pytest.raises(ValueError, match=r"2 of 4 layers merge in front of them, .* leaves 16 of 64"):
        make_schedule(ToMeConfig(visual_tokens=8, merge_every=2), geometry)
    with pytest.raises(ValueError, match="merged behind its projector"):
        make_schedule(ToMeConfig(visual_tokens=8, merge_every=2), MergeGeometry(64))
    with pytest.raises(ValueError, match="which layers merge"):
        ToMeConfig(r=[2, 0], merge_every=2)
    with pytest.raises(ValueError, match="decided in every layer"):
        CrossGetConfig(dynamic=True, merge_every=2)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="merge_every"):
            ToMeConfig(merge_every=wrong)
    assert ToMeConfig.from_dict(ToMeConfig(keep_ratio=0.5, merge_every=2).to_dict()).merge_every == 2


@pytest.mark.parametrize("method", [CrossGetConfig, ToMeConfig])
def test_a_dial_that_cannot_be_met_says_what_can(method) -> None:
    """One layer in front of the one that is read: the number in the message is reachable, one less is not."""
    geometry = TowerGeometry(patches=25, prefix=1, layers=4, read=1)
    least = 14 if method is CrossGetConfig else 13
    with pytest.raises(ValueError, match=rf"12 visual tokens cannot be reached: 1 of 4 layers .* leaves {least} of 25"):
        make_schedule(method(), geometry)
    assert make_schedule(method(visual_tokens=least), geometry).features == least
    assert make_schedule(method(keep_ratio=-(-least // 0.25) / 100), geometry).features == least
    with pytest.raises(ValueError, match=rf"visual_tokens>={least} or keep_ratio>=0\.{-(-least * 4)}$"):
        make_schedule(method(visual_tokens=least - 1), geometry)


def test_an_image_of_one_patch_has_no_room_for_a_cross_token() -> None:
    geometry = TowerGeometry(patches=1, prefix=1, layers=3, read=2)
    with pytest.raises(ValueError, match="an image of 1 leaves no room for a cross token; ask for keep_ratio=1"):
        make_schedule(CrossGetConfig(), geometry)
    assert make_schedule(CrossGetConfig(keep_ratio=1.0), geometry).features == 1


COSTS = TowerCosts(width=1024, inner=4096, language_token=13_000_000_000)  # LLaVA-1.5-7B


def flops(schedule, geometry) -> int:
    """Tower and language model, layer by layer."""
    costs, total = geometry.costs, 0
    for layer in range(geometry.read):
        entering, left = schedule.tokens[layer], schedule.tokens[layer + 1]
        total += 8 * entering * costs.width**2 + 4 * entering**2 * costs.width
        total += 4 * costs.width * costs.inner * (entering if layer == schedule.output else left)
    return total + schedule.features * costs.language_token


@pytest.mark.parametrize("name", ["crossget", "tome", "random"])
@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.25, 0.125, 0.0625])
def test_auto_costs_three_percent_more_than_constant_at_most_and_starts_later(name, ratio) -> None:
    geometry = replace(LLAVA_15, costs=COSTS)
    constant, auto = (
        make_schedule(method_class(name)(keep_ratio=ratio, schedule=kind), geometry) for kind in ("constant", "auto")
    )
    assert auto.features == constant.features
    assert flops(auto, geometry) <= 1.03 * flops(constant, geometry)
    first = [next(layer for layer, removed in enumerate(one.removals) if removed) for one in (constant, auto)]
    assert first[0] == 0
    assert first[1] > 1


@pytest.mark.parametrize("name", ["crossget", "tome"])
@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.125])
def test_a_tower_that_costs_more_than_the_language_model_keeps_a_quarter_of_its_savings(name, ratio) -> None:
    geometry = TowerGeometry(144, 1, 8, 7, costs=TowerCosts(width=128, inner=256, language_token=700_000))
    kinds = {kind: make_schedule(method_class(name)(keep_ratio=ratio, schedule=kind), geometry)
             for kind in ("constant", "auto")}  # fmt: skip
    whole = make_schedule(method_class(name)(keep_ratio=1.0), geometry)
    saved = {kind: flops(whole, geometry) - flops(one, geometry) for kind, one in kinds.items()}
    language = (whole.features - kinds["auto"].features) * geometry.costs.language_token
    assert saved["auto"] - language >= 0.24 * (saved["constant"] - language)


@PROPERTY
@given(geometries(), st.floats(0.02, 1.0), st.sampled_from(["crossget", "tome", "random"]))
def test_auto_reaches_what_is_asked_for(geometry, ratio, name) -> None:
    config, target = method_class(name)(keep_ratio=ratio), max(1, round(ratio * geometry.placeholders))
    assume(target >= least_features(geometry, config.uses_cross_tokens))  # fewer is another test's
    schedule = make_schedule(config, replace(geometry, costs=COSTS))
    assert schedule.features == max(1, round(ratio * geometry.placeholders))
    assert sum(schedule.removals) == schedule.tokens[0] - schedule.tokens[-1]


def test_without_costs_auto_is_constant() -> None:
    assert make_schedule(ToMeConfig(keep_ratio=0.3), LLAVA_15) == make_schedule(
        ToMeConfig(keep_ratio=0.3, schedule="constant"), LLAVA_15
    )


def test_an_output_selection_has_one_step_and_leaves_the_cross_token_out() -> None:
    schedule = make_schedule(CrossGetConfig(visual_tokens=1, schedule="output"), LLAVA_15)
    assert schedule.output == 22
    assert schedule.removals == (0,) * 22 + (575,) + (0,)
    assert schedule.features == 1
    assert schedule.drop_cross
    with pytest.raises(ValueError, match="select among all tokens"):
        ToMeConfig(keep_ratio=0.5, schedule="output")
