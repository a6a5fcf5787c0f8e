"""Damaged and hostile files: each is loaded, or refused with a ``ValueError`` or ``OSError`` that leaves the model as
it was. Nothing in them is executed, and a load that succeeds leaves finite weights."""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from mllm_crossget import accelerate_mllm, load_crossget, load_official_cross_tokens, save_crossget
from mllm_crossget.hooks.ground.state import handle_of
from tests.helpers.exploring import SEED, explore, in_parts
from tests.helpers.small_files import official_state
from tests.helpers.tiny import randomise_cross_tokens, tiny_llava
from tests.helpers.versions import TRAINS

if not TRAINS:
    pytest.skip("adapters are made by mllm_crossget.training, which needs newer transformers", allow_module_level=True)

from mllm_crossget.training import lora_config

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own look-up
METHODS = ("crossget", "madtp", "tome")
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 3, 1e400, float("nan"), 10**400, "", "x", "../../etc", [], [[]], {}, {"a": 1}, "0.5", [0.1],
)  # fmt: skip


class Payload:
    """What runs code when it is unpickled."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.canary),)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole folders, one for every method, with an adapter, and the official file."""
    root = tmp_path_factory.mktemp("whole")
    for method in METHODS:
        small = {"alignment_tokens": 4, "alignment_width": 8} if method == "madtp" else {}
        model = accelerate_mllm(tiny_llava(), method=method, keep_ratio=0.5, **small)
        randomise_cross_tokens(model)
        save_crossget(model, root / method)
    tuned = get_peft_model(model, lora_config(model, r=2, alpha=4, dropout=0.0))
    tuned.save_pretrained(root / "adapter")
    save_crossget(tuned, root / "adapter")
    (root / "official").mkdir()
    torch.save(official_state(), root / "official" / "cross_tokens.bin")
    return root


def damage(data: bytes, choose: random.Random, canary: str) -> bytes:
    """Other bytes: bits turned over, cut, doubled, filled with zeros, or something else altogether."""
    kind = choose.choice(
        ["flip", "flip", "header", "cut", "splice", "zeros", "text", "pickle", "json", "json", "empty"]
    )
    if kind == "json" and data[:1] == b"{":
        return json.dumps(mutated(json.loads(data), choose)).encode()
    place = choose.randrange(len(data)) if data else 0
    if kind in ("flip", "header", "json"):
        changed = bytearray(data)
        for _ in range(choose.randint(1, 8)):
            at = choose.randrange(min(len(data), 200) if kind == "header" else len(data))
            changed[at] ^= 1 << choose.randrange(8)
        return bytes(changed)
    if kind == "pickle":
        file = io.BytesIO()
        torch.save({"model.cross_text": Payload(canary)}, file)
        return choose.choice([file.getvalue(), pickle.dumps(Payload(canary))])
    end = min(len(data), place + choose.randint(1, 64))
    return {
        "cut": data[:place],
        "splice": data[:place] + data[place:end] * 2 + data[end:],
        "zeros": data[:place] + bytes(end - place) + data[end:],
        "text": b"Repository not found",
        "empty": b"",
    }[kind]


def mutated(values: Any, choose: random.Random) -> Any:
    """A JSON object in which one thing, at any depth, is another."""
    values = copy.deepcopy(values)
    inside = [values]
    for one in inside:
        children = one.values() if isinstance(one, dict) else one
        inside += [child for child in children if isinstance(child, (dict, list)) and child]
    target = choose.choice(inside)
    keys = list(target) if isinstance(target, dict) else list(range(len(target)))
    key, way = choose.choice(keys), choose.choice(["value", "value", "remove", "more"])
    if way == "remove":
        del target[key]
    elif way == "more" and isinstance(target, dict):
        target[choose.choice(["__class__", "auto_map", "method", "weights", "x"])] = choose.choice(VALUES)
    else:
        target[key] = choose.choice(VALUES)
    return values


def state_of(model: nn.Module) -> tuple[Any, ...]:
    handle = handle_of(model)
    return (
        None if handle is None else handle.method,
        [(name, value.clone()) for name, value in model.state_dict().items()],
        [(type(module), sorted(vars(module))) for module in model.modules()],
    )


def assert_same(now: tuple[Any, ...], before: tuple[Any, ...]) -> None:
    assert (now[0], now[2]) == (before[0], before[2])
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(now[1], before[1], strict=True))


def check_file(root: Path, scratch: Path, kind: str, start: str | None, seed: int) -> None:
    choose, folder, canary = random.Random(seed), scratch / "folder", scratch / "canary"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / kind, folder)
    file = choose.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"))
    file.write_bytes(damage(file.read_bytes(), choose, str(canary)))
    model = tiny_llava()
    if start is not None:
        accelerate_mllm(model, method=start, keep_ratio=0.3)
        randomise_cross_tokens(model)
    before = state_of(model)
    try:
        (load_official_cross_tokens if kind == "official" else load_crossget)(model, folder)
    except (ValueError, OSError) as error:
        said = str(error)
    else:
        said = None
        assert all(torch.isfinite(value).all() for _, value in model.state_dict().items())
    if said is not None:
        assert said.strip()
        assert_same(state_of(model), before)
    assert not canary.exists()


@in_parts(short=25, long=1000)
def test_a_damaged_file_is_refused_or_harmless(
    examples: int, part: int, folders: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    scratch = tmp_path_factory.mktemp("scratch")

    def check(kind: str, start: str | None, seed: int) -> None:
        check_file(folders, scratch, kind, start, seed)

    kinds = st.sampled_from([*METHODS, "adapter", "official"])
    explore(
        check, examples, SEED + part, kind=kinds, start=st.sampled_from([None, "crossget"]), seed=st.integers(0, 10**9)
    )


def test_the_payload_would_run(tmp_path: Path) -> None:
    """So that its absence above means something."""
    pickle.loads(pickle.dumps(Payload(str(tmp_path / "canary"))))
    assert (tmp_path / "canary").exists()
