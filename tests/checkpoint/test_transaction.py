"""A refused load leaves the model as it was, whatever raises and where; ``accelerated`` gives learned state back."""

from __future__ import annotations

import json
import shutil
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import _has_any_global_hook as has_global_hook

from mllm_crossget import (
    CrossGetConfig,
    accelerate_mllm,
    accelerated,
    load_crossget,
    load_official_cross_tokens,
    restore_mllm,
    save_crossget,
)
from mllm_crossget.api import unreduced
from mllm_crossget.hooks.ground import running_calls
from mllm_crossget.hooks.ground.state import handle_of, live_cross_tokens
from mllm_crossget.training import load_finetuned, lora_config
from tests.helpers.fingerprints import assert_identical, fingerprint
from tests.helpers.interrupts import interrupted, run_to
from tests.helpers.products import rest_unless
from tests.helpers.small_files import learned, logits, official_state
from tests.helpers.tiny import randomise_cross_tokens, tiny_llava

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own look-up
ADAPTER = "adapter_model.safetensors"
STATES = ("stock", "accelerated", "with adapter")
STOCK = (("accelerate", "stock"), ("load", "stock"))


def fine_tune(folder, seed: int, **settings):
    """A run's files, and the logits of what was trained."""
    base = accelerate_mllm(tiny_llava(), CrossGetConfig(keep_ratio=0.5))
    model = get_peft_model(base, lora_config(base, **{"r": 2, "alpha": 4, "dropout": 0.0, **settings}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (one for one in model.parameters() if one.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    save_crossget(model, folder)
    return logits(model.eval())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return folder, {name: fine_tune(folder / name, seed) for seed, name in enumerate("ab")}


def _edit(folder, change) -> None:
    tensors = load_file(folder / ADAPTER)
    name = next(name for name in tensors if "lora_A" in name)
    new = change(tensors.pop(name))
    save_file({**tensors, **({} if new is None else {name: new})}, folder / ADAPTER)


def _configure(folder, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE = {
    "no JSON": lambda f: (f / "adapter_config.json").write_text("{"),
    "no object": lambda f: (f / "adapter_config.json").write_text("[]"),
    "cut": lambda f: (f / ADAPTER).write_bytes((f / ADAPTER).read_bytes()[:-9]),
    "missing": lambda f: (f / ADAPTER).unlink(),
    "other modules": lambda f: _configure(f, target_modules=["nowhere"]),
    "other rank": lambda f: _configure(f, r=3),
    "unknown kind": lambda f: _configure(f, peft_type="MAGIC"),
    "one is missing": lambda f: _edit(f, lambda one: None),
    "integers": lambda f: _edit(f, torch.Tensor.long),
    "infinite": lambda f: _edit(f, lambda one: one * float("inf")),
    "other shape": lambda f: _edit(f, lambda one: one[:, :3].contiguous()),
}


@pytest.mark.parametrize(
    ("damage", "state"),
    [  # a model with an adapter has most to give back; a file that cannot be read, a key too few, a value too large
        pytest.param(
            damage, state, marks=rest_unless(state == STATES[-1] or damage in ("cut", "one is missing", "infinite"))
        )
        for damage in DAMAGE
        for state in STATES
    ],
)
def test_a_damaged_adapter_leaves_the_model_as_it_was(damage, state, runs, tmp_path) -> None:
    shutil.copytree(runs[0] / "a", tmp_path / "a")
    DAMAGE[damage](tmp_path / "a")
    model = tiny_llava() if state == "stock" else learned("madtp", alignment_tokens=5)
    if state == "with adapter":
        load_crossget(model, runs[0] / "b")
    before, learns = fingerprint(model), [one.requires_grad for one in model.parameters()]
    with pytest.raises((ValueError, OSError)):
        load_crossget(model, tmp_path / "a")
    assert_identical(fingerprint(model), before)
    assert [one.requires_grad for one in model.parameters()] == learns
    restore_mllm(model)
    assert_identical(fingerprint(model), fingerprint(tiny_llava()))


def test_loading_over_one_another_and_restoring(runs) -> None:
    folder, wanted = runs
    model = tiny_llava()
    for name in "abba":
        assert torch.equal(logits(load_crossget(model, folder / name)), wanted[name])
        accelerate_mllm(model, keep_ratio=0.25)
        assert torch.equal(logits(accelerate_mllm(model, keep_ratio=0.5)), wanted[name])
    assert list(model.peft_config) == ["default"]
    assert_identical(fingerprint(restore_mllm(model)), fingerprint(tiny_llava()))


def test_fine_tuned_runs_over_one_another(runs) -> None:
    folder, wanted = runs
    first = load_finetuned(tiny_llava(), folder / "a")
    second = load_finetuned(first, folder / "b")
    assert torch.equal(logits(second), wanted["b"])
    with pytest.raises(ValueError, match="has no crossget_config"):
        load_finetuned(second, folder)
    assert torch.equal(logits(second), wanted["b"])


@pytest.mark.parametrize("damage", ["cut", "other modules", "integers"])
def test_a_refused_fine_tuned_run_leaves_the_one_before(damage, runs, tmp_path) -> None:
    folder, wanted = runs
    shutil.copytree(folder / "a", tmp_path / "a")
    DAMAGE[damage](tmp_path / "a")
    stock, model = tiny_llava(), load_finetuned(tiny_llava(), folder / "b")
    for target in (stock, model):
        with pytest.raises((ValueError, OSError)):
            load_finetuned(target, tmp_path / "a")
    assert_identical(fingerprint(stock), fingerprint(tiny_llava()))
    assert torch.equal(logits(model), wanted["b"])


def test_an_adapter_of_the_users_is_not_replaced(runs) -> None:
    model = get_peft_model(accelerate_mllm(tiny_llava(), keep_ratio=0.5), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="carries an adapter"):
        load_crossget(model, runs[0] / "a")
    with pytest.raises(ValueError, match="unload"):
        load_finetuned(get_peft_model(tiny_llava(), LoraConfig(r=2, target_modules=["q_proj"])), runs[0] / "a")


def _for_a_while(model) -> None:
    with accelerated(model, method="madtp", alignment_tokens=7, reference=True):
        pass


def _untouched(model) -> None:
    with unreduced(model):
        pass


@pytest.mark.parametrize(
    ("what", "state"),
    [  # a stock model, and the one that has most to give back
        pytest.param(what, state, marks=rest_unless(state == STATES[-1] or (what, state) in STOCK))
        for what in ("accelerate", "load", "official", "accelerated", "unreduced")
        for state in STATES[what == "unreduced" :]
    ],
)
def test_an_interrupt_anywhere_leaves_the_model_as_it_was(what, state, runs, tmp_path) -> None:
    torch.save(official_state(), tmp_path / "cross_tokens.bin")
    model = tiny_llava() if state == "stock" else learned("madtp", alignment_tokens=5)
    if state == "with adapter":
        load_crossget(model, runs[0] / "b")
    call = {
        "accelerate": lambda: accelerate_mllm(model, method="tome", keep_ratio=0.3),
        "load": lambda: load_crossget(model, runs[0] / "a"),
        "official": lambda: load_official_cross_tokens(model, tmp_path, CrossGetConfig(r=2)),
        "accelerated": lambda: _for_a_while(model),
        "unreduced": lambda: _untouched(model),
    }[what]
    before, classes, at = logits(model), [type(module) for module in model.modules()], 1
    while interrupted(call, at):
        assert torch.equal(logits(model), before), at
        assert [type(module) for module in model.modules()] == classes, at
        at = int(at * 1.4) + 3
    assert at > (20 if what == "unreduced" else 100)


def test_an_interrupt_while_accelerated_is_left_gives_everything_back(runs) -> None:
    model = learned("madtp", alignment_tokens=5)
    load_crossget(model, runs[0] / "b")
    before, lines = logits(model), run_to(lambda: _for_a_while(model), 10**9)
    for at in range(lines // 2, lines, lines // 40):
        assert interrupted(lambda: _for_a_while(model), at)
        assert torch.equal(logits(model), before), at


@pytest.mark.parametrize("what", ["accelerate", "load", "official"])
def test_an_interrupt_while_other_threads_are_let_in_again_undoes_the_change(what, runs, tmp_path) -> None:
    torch.save(official_state(), tmp_path / "cross_tokens.bin")

    def changed(model) -> None:
        if what == "accelerate":
            accelerate_mllm(model, method="tome", keep_ratio=0.3)
        elif what == "load":
            load_crossget(model, runs[0] / "a")
        else:
            load_official_cross_tokens(model, tmp_path, CrossGetConfig(r=2))

    model, other = (accelerate_mllm(tiny_llava(), keep_ratio=0.5) for _ in range(2))
    changed(accelerate_mllm(tiny_llava(), keep_ratio=0.5))  # fills what is kept for the next call
    before, lines = logits(model), run_to(lambda: changed(other), 10**9)
    after, undone = logits(other), 0
    step = 1 if what == "accelerate" else 3  # the last lines are the same
    for at in range(lines - 40, lines, step):
        assert interrupted(lambda: changed(model), at), at
        now = logits(model)
        assert not has_global_hook(), at
        if torch.equal(now, after):  # nothing is left to do but to return the model
            break
        assert torch.equal(now, before), at
        undone += 1
    assert undone > 10 // step


def test_a_change_whose_clean_up_was_interrupted_keeps_no_other_thread_waiting() -> None:
    model = tiny_llava()
    wanted, answers, left, at = logits(model), [], 0, 1

    def change() -> None:
        with running_calls.alone(model, "a test"):
            pass

    while interrupted(change, at):
        left += bool(has_global_hook())
        other = threading.Thread(target=lambda: answers.append(logits(model)), daemon=True)
        other.start()
        other.join(60)
        assert len(answers) == at, at
        assert torch.equal(answers[-1], wanted)
        assert not has_global_hook(), at
        at += 1
    assert not running_calls._CHANGES
    assert left > 0, "no line leaves a change behind any more: this test can go"


@pytest.mark.parametrize("inside", ["other alignment tokens", "load", "train", "restore"])
def test_leaving_accelerated_gives_learned_state_back(inside, runs) -> None:
    model = learned("madtp", alignment_tokens=5)
    randomise_cross_tokens(accelerate_mllm(model, keep_ratio=0.5), seed=3)
    settings = handle_of(model).method
    before, parameters = fingerprint(model), list(model.parameters())
    with accelerated(model, method="madtp", alignment_tokens=7, reference=True):
        if inside == "load":
            load_crossget(model, runs[0] / "a")
        elif inside == "train":
            with torch.no_grad():
                for module in live_cross_tokens(model).values():
                    for parameter in module.parameters():
                        parameter.add_(1)
        elif inside == "restore":
            restore_mllm(model)
    assert_identical(fingerprint(model), before)
    assert handle_of(model).method == settings
    assert all(now is old for now, old in zip(model.parameters(), parameters, strict=True))


def test_half_precision_refuses_what_it_cannot_hold(tmp_path) -> None:
    model = learned()
    with torch.no_grad():
        live_cross_tokens(model)["text"].weight.fill_(1e5)
    save_crossget(model, tmp_path)
    half = tiny_llava().half()
    classes = [type(module) for module in half.modules()]
    with pytest.raises(ValueError, match=r"text\.cross.*float16.*cannot hold"):
        load_crossget(half, tmp_path)
    assert [type(module) for module in half.modules()] == classes
    load_crossget(tiny_llava().bfloat16(), tmp_path)


@pytest.mark.parametrize("load", [load_crossget, load_finetuned])
def test_half_precision_refuses_an_adapter_that_it_cannot_hold(load, runs, tmp_path) -> None:
    shutil.copytree(runs[0] / "a", tmp_path / "a")
    _edit(tmp_path / "a", lambda one: one * 1e9)
    half = tiny_llava().half()
    classes = [type(module) for module in half.modules()]
    if load is load_finetuned:  # PEFT keeps its own weights in float32
        half = load(half, tmp_path / "a")
    else:
        with pytest.raises(ValueError, match="cannot hold"):
            load(half, tmp_path / "a")
        assert [type(module) for module in half.modules()] == classes
    assert all(torch.isfinite(parameter).all() for parameter in half.parameters())
