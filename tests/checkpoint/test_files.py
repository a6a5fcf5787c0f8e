"""The small files: round trips, what stock transformers makes of the folder, and files that are damaged."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaForConditionalGeneration

from mllm_crossget import (
    CrossGetConfig,
    RandomConfig,
    ReductionConfig,
    ToMeConfig,
    accelerate_mllm,
    load_crossget,
    load_official_cross_tokens,
    method_names,
    restore_mllm,
    save_crossget,
)
from mllm_crossget.config import method_class
from tests.helpers.fingerprints import assert_identical, fingerprint
from tests.helpers.methods import OWN, prepare
from tests.helpers.small_files import (
    CONFIG,
    LAYERS,
    OLD_WEIGHTS,
    TEXT_LAYERS,
    WIDTH,
    learned,
    logits,
    official_state,
    weights_in,
)
from tests.helpers.tiny import randomise_cross_tokens, tiny_llava

DIALS = [{}, {"keep_ratio": 0.3}, {"visual_tokens": 5}, {"r": 2}, {"r": [1, 0, 2, 3]}, {"keep_ratio": 1}]
HUGE = torch.full((TEXT_LAYERS, WIDTH), 1e300, dtype=torch.float64)


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[nn.Module, dict]]:
    """Models that no refused file may change, for all tests, each with its fingerprint."""
    made = {
        "stock": tiny_llava(),
        "accelerated": learned(keep_ratio=0.7),
        "madtp": learned("madtp", alignment_tokens=5),
    }
    return {name: (model, fingerprint(model)) for name, model in made.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that fit, to copy and damage."""
    folder = tmp_path_factory.mktemp("saved")
    save_crossget(learned(), folder)
    return folder


def as_version_01(folder: Path) -> None:
    """The same files as version 0.1 wrote them."""
    weights_in(folder).rename(folder / OLD_WEIGHTS)
    (folder / "crossget_weights").rmdir()
    _edit_settings(folder, weights=None)


@pytest.mark.parametrize("dial", DIALS, ids=str)
@pytest.mark.parametrize("method", method_names())
def test_settings_survive_a_file(method, dial, tmp_path) -> None:
    config = method_class(method)(**dial)
    path = config.save_pretrained(tmp_path / "new")
    again = ReductionConfig.from_pretrained(tmp_path / "new")
    assert type(again) is type(config)
    assert again == config
    assert type(config).from_pretrained(tmp_path / "new") == config
    assert json.loads(path.read_text())["method"] == method


@pytest.mark.parametrize(
    "config",
    [CrossGetConfig(kl="js", alignment_weight=0.5), ToMeConfig(order="reference"), RandomConfig(seed=3, drop=True)],
    ids=repr,
)
def test_options_survive_a_file(config, tmp_path) -> None:
    config.save_pretrained(tmp_path)
    assert ReductionConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("method", OWN)
def test_small_files_make_a_fresh_model_the_same(method, tmp_path) -> None:
    model = learned(method, keep_ratio=0.4)
    paths = save_crossget(model, tmp_path)
    has_learned_parts = model.__dict__["_mllm_crossget"].method.has_learned_parts
    assert paths == ([tmp_path / CONFIG, weights_in(tmp_path)] if has_learned_parts else [tmp_path / CONFIG])
    fresh = tiny_llava()
    assert load_crossget(fresh, tmp_path) is fresh
    assert_identical(fingerprint(fresh), fingerprint(model))


def test_keys_do_not_name_modules(tmp_path) -> None:
    save_crossget(learned(), tmp_path)
    shapes = {name: tuple(value.shape) for name, value in load_file(weights_in(tmp_path)).items()}
    assert shapes == {"vision.cross": (LAYERS, WIDTH), "text.cross": (TEXT_LAYERS, WIDTH)}


def test_another_dial_with_saved_cross_tokens(tmp_path) -> None:
    model = learned(keep_ratio=0.5)
    save_crossget(model, tmp_path)
    accelerate_mllm(model, keep_ratio=0.25)
    fresh = load_crossget(tiny_llava(), tmp_path, config=CrossGetConfig(keep_ratio=0.25))
    assert torch.equal(logits(fresh), logits(model))


def test_loading_replaces_what_an_accelerated_model_had(tmp_path) -> None:
    model = learned(keep_ratio=0.5)
    save_crossget(model, tmp_path)
    other = accelerate_mllm(tiny_llava(), keep_ratio=0.25)
    randomise_cross_tokens(other, seed=9)
    assert torch.equal(logits(load_crossget(other, tmp_path)), logits(model))


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("method", OWN)
def test_stock_transformers_loads_the_checkpoint_without_a_word(method, tower, tmp_path) -> None:
    model = tiny_llava(tower)
    before = logits(model)
    prepare(model, method=method)
    randomise_cross_tokens(model)
    model.save_pretrained(tmp_path)
    assert {CONFIG, "config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    stock, report = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(stock.eval()), before)
    assert torch.equal(logits(load_crossget(stock, tmp_path)), logits(model))
    assert torch.equal(logits(restore_mllm(model)), before)


def test_a_state_dict_that_a_trainer_gathered_is_what_is_written(tmp_path) -> None:
    model = learned()
    gathered = {name: value.clone() + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    name = next(name for name in gathered if name.endswith("language_model.cross_tokens.weight"))
    assert torch.equal(load_file(weights_in(tmp_path))["text.cross"], gathered[name])
    assert not any("cross_tokens" in key for key in load_file(tmp_path / "model.safetensors"))


def test_other_processes_write_nothing(tmp_path) -> None:
    learned().save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / CONFIG).exists()


def test_a_restored_model_writes_stock_files_only(tmp_path) -> None:
    restore_mllm(learned()).save_pretrained(tmp_path)
    assert not (tmp_path / CONFIG).exists()


def _rewrite(folder, **changes) -> None:
    """Other tensors in both files' good order: the settings name the new content."""
    path = weights_in(folder)
    tensors = {**load_file(path), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)
    if path.name != OLD_WEIGHTS:
        entry = {"file": f"crossget_weights/{path.name}", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        _edit_settings(folder, weights=entry)


def _edit_settings(folder, **changes) -> None:
    values = {**json.loads((folder / CONFIG).read_text()), **changes}
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def _cut(folder) -> None:
    weights_in(folder).write_bytes(weights_in(folder).read_bytes()[:-7])


def _nan(rows: int) -> torch.Tensor:
    return torch.full((rows, WIDTH), float("nan"))


DAMAGE = {
    "truncated weights": (_cut, ["safetensors", "save"]),
    "weights of noise": (lambda f: weights_in(f).write_bytes(b"\x07" * 64), ["safetensors", "save"]),
    "empty weights": (lambda f: weights_in(f).write_bytes(b""), ["safetensors", "save"]),
    "no weights": (lambda f: weights_in(f).unlink(), ["has no crossget", "crossget"]),
    "no settings": (lambda f: (f / CONFIG).unlink(), [f"has no {CONFIG}"]),
    "other width": (lambda f: _rewrite(f, **{"vision.cross": torch.zeros(LAYERS, 8)}), ["(4, 8)", "(4, 32)"]),
    "other depth": (lambda f: _rewrite(f, **{"text.cross": torch.zeros(9, WIDTH)}), ["(9, 32)", "(3, 32)", "another"]),
    "one side missing": (lambda f: _rewrite(f, **{"text.cross": None}), ["vision.cross", "text.cross", "does not fit"]),
    "not finite": (lambda f: _rewrite(f, **{"vision.cross": _nan(LAYERS)}), ["vision.cross", "not finite"]),
    "settings not JSON": (lambda f: (f / CONFIG).write_text("{"), ["not a JSON file", "save_pretrained"]),
    "settings binary": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), ["not a JSON file", "save_pretrained"]),
    "settings a list": (lambda f: (f / CONFIG).write_text("[1]"), ["list", "expected an object"]),
    "newer format": (lambda f: _edit_settings(f, format_version=99), ["format_version=99", "upgrade"]),
    "unknown method": (lambda f: _edit_settings(f, method="magic"), ["'magic'", "crossget"]),
    "unknown field": (lambda f: _edit_settings(f, spell="xyzzy"), ["spell", "its fields are"]),
    "method a list": (lambda f: _edit_settings(f, method=["tome"]), [CONFIG, "tome"]),
    "dial a text": (lambda f: _edit_settings(f, keep_ratio="half"), [CONFIG, "keep_ratio", "half"]),
    "huge number": (lambda f: _edit_settings(f, dynamic=True, threshold=[10**400]), [CONFIG, "no valid settings"]),
    "deep JSON": (lambda f: (f / CONFIG).write_text("[" * 200000), ["not a JSON file"]),
    "integers": (lambda f: _rewrite(f, **{"text.cross": torch.ones(3, WIDTH).long()}), ["text.cross", "int64"]),
    "bools": (lambda f: _rewrite(f, **{"text.cross": torch.ones(3, WIDTH).bool()}), ["text.cross", "bool"]),
    "complex": (lambda f: _rewrite(f, **{"text.cross": torch.ones(3, WIDTH).cfloat()}), ["text.cross", "complex64"]),
    "too large": (lambda f: _rewrite(f, **{"text.cross": HUGE}), ["text.cross", "cannot hold"]),
    "bad dial": (lambda f: _edit_settings(f, keep_ratio=3), ["keep_ratio", "3"]),
    "dial for another model": (lambda f: _edit_settings(f, keep_ratio=None, visual_tokens=99), ["99", "1 to 16"]),
}  # fmt: skip


@pytest.mark.parametrize(("state", "version"), [("stock", "new"), ("accelerated", "new"), ("accelerated", "0.1")])
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_leave_the_model_as_it_was(name, state, version, saved, models, tmp_path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    if version == "0.1":
        as_version_01(tmp_path)
    damage, says = DAMAGE[name]
    damage(tmp_path)
    model, expected = models[state]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is checked below
        load_crossget(model, tmp_path)
    assert all(part in str(caught.value) for part in says), str(caught.value)
    assert_identical(fingerprint(model), expected)


def test_settings_of_one_method_are_not_read_as_another(tmp_path) -> None:
    ToMeConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ToMeConfig"):
        CrossGetConfig.from_pretrained(tmp_path)


def of_each(change) -> dict:
    return {name: change(tensor[0]) for name, tensor in official_state().items()}


def quantised(tensor: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


@pytest.mark.parametrize("given", ["file", "folder"])
def test_official_cross_tokens(given, tmp_path) -> None:
    state = official_state()
    torch.save(state, tmp_path / "cross_tokens.bin")
    config = CrossGetConfig(r=2)
    path = tmp_path if given == "folder" else tmp_path / "cross_tokens.bin"
    model = load_official_cross_tokens(tiny_llava(), path, config)
    text, vision = state.values()
    ours = {name: value for name, value in model.state_dict().items() if "cross_tokens" in name}
    assert torch.equal(ours["model.language_model.cross_tokens.weight"], text[0])
    assert torch.equal(next(value for name, value in ours.items() if "vision_tower" in name), vision[0])
    save_crossget(model, tmp_path / "ours")
    assert torch.equal(logits(load_crossget(tiny_llava(), tmp_path / "ours")), logits(model))


def test_official_default_is_the_published_setting(tmp_path) -> None:
    torch.save(official_state(), tmp_path / "cross_tokens.bin")
    model = tiny_llava(image_size=112)  # 64 patches: enough to take 13 from
    load_official_cross_tokens(model, tmp_path)
    assert model.__dict__["_mllm_crossget"].method == CrossGetConfig.published(r=13)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda f: None, ["does not exist", "cross_tokens.bin"]),
        (lambda f: torch.save({}, f), ["does not fit", "vision.cross"]),
        (lambda f: torch.save(official_state(layers=7), f), ["(7, 32)", "(4, 32)"]),
        (lambda f: torch.save({k: v * float("inf") for k, v in official_state().items()}, f), ["not finite"]),
        (lambda f: f.write_bytes(b"not a checkpoint"), ["cross_tokens.bin", "torch.save"]),
        (lambda f: f.write_bytes(b""), ["cross_tokens.bin", "torch.save"]),
        (lambda f: f.write_bytes(pickle.dumps(print)), ["cross_tokens.bin"]),
        (lambda f: torch.save([torch.zeros(2)], f), ["cross_tokens.bin", "list"]),
        (lambda f: f.write_bytes(b"hello" * 100), ["cross_tokens.bin", "torch.save"]),
        (lambda f: f.write_bytes(b"Repository not found"), ["cross_tokens.bin", "torch.save"]),
        (lambda f: torch.save({1: torch.zeros(2)}, f), ["cross_tokens.bin", "under names"]),
        (lambda f: torch.save({"model.cross_text": torch.zeros(2, 2, 32)}, f), ["(2, 2, 32)", "(layers, width)"]),
        (lambda f: torch.save(of_each(torch.Tensor.to_sparse), f), ["dense", "sparse"]),
        (lambda f: torch.save(of_each(lambda one: one.to("meta")), f), ["no weights", "meta"]),
        (lambda f: torch.save(of_each(quantised), f), ["dense", "qint8"]),
        (lambda f: torch.save(of_each(torch.Tensor.long), f), ["no weights", "int64"]),
    ],
    ids=["missing", "empty", "depth", "inf", "noise", "zero bytes", "code", "list", "text", "error page",
         "integer keys", "three dimensions", "sparse", "meta", "quantised", "integers"],
)  # fmt: skip
@pytest.mark.parametrize("state", ["stock", "accelerated"])
def test_official_files_that_do_not_fit(write, says, state, models, tmp_path) -> None:
    write(tmp_path / "cross_tokens.bin")
    model, expected = models["stock" if state == "stock" else "madtp"]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is checked below
        load_official_cross_tokens(model, tmp_path / "cross_tokens.bin", CrossGetConfig(r=2))
    assert all(part in str(caught.value) for part in says), str(caught.value)
    assert_identical(fingerprint(model), expected)
