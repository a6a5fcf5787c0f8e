"""Values of wrong kinds for every argument of every public function, drawn from the signatures.

Each call works, or raises ``ValueError`` or ``TypeError`` from a line that says what is wrong: no error of an
attribute or an index that happened to be looked up first. A model that was given is afterwards what it was.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

import mllm_crossget
from mllm_crossget import accelerate_mllm, method_names
from mllm_crossget.config import method_class
from tests.helpers.fingerprints import assert_identical, fingerprint
from tests.helpers.methods import prepare
from tests.helpers.tiny import pixels, prompt_batch, randomise_cross_tokens, tiny_llava

WRONG: dict[str, Any] = {
    "None": None, "text": "x", "empty": "", "minus": -1, "zero": 0, "huge": 10**400, "half": 0.5, "nan": float("nan"),
    "true": True, "list": [], "nested": [[None]], "dict": {"a": 1}, "bytes": b"x", "object": object(), "type": int,
    "tensor": torch.zeros(2), "ints": torch.zeros(1, 1, dtype=torch.int64), "module": torch.nn.Linear(1, 1),
    "path": Path("/dev/null/folder"),
}  # fmt: skip
PYTHONS_OWN = (
    "object is not",
    "object has no attribute",
    "not supported between",
    "unsupported operand",
    "os.PathLike",
)
METHODS = {name: method_class(name) for name in method_names()}
IMAGES = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))


def good_arguments(name: str, folder: Path) -> dict[str, Any]:
    """A call that works, by the names of its arguments."""
    stock = tiny_llava("siglip", layers=2, text_layers=1)
    method = "crossget-dynamic" if name == "calibrate" else "crossget"
    accelerated = prepare(tiny_llava("siglip", layers=2, text_layers=1), method=method, keep_ratio=0.6)
    randomise_cross_tokens(accelerated)
    if name == "load_crossget":
        mllm_crossget.save_crossget(accelerated, folder)
    batch = prompt_batch(stock, (1,))
    calls: dict[str, dict[str, Any]] = {
        "accelerate_mllm": {"model": accelerated},
        "accelerated": {"model": accelerated},
        "calibrate": {"model": accelerated, "images": pixels(stock, 4)},
        "compact_lengths": {"model": accelerated, "inputs": batch},
        "generate_in_batches": {"model": accelerated, "requests": [batch], "max_rows": 2, "max_new_tokens": 1},
        "join_requests": {"requests": [batch, batch]},
        "load_crossget": {"model": accelerated, "name_or_path": folder},
        "load_official_cross_tokens": {"model": accelerated, "path": folder / "cross_tokens.bin"},
        "ramp": {"r": 4, "layers": 4},
        "restore_mllm": {"model": accelerated},
        "retrieval_ranks": {"query_embeds": IMAGES, "candidate_embeds": IMAGES, "is_match": torch.eye(4).bool()},
        "retrieval_recall": {"image_embeds": IMAGES, "text_embeds": IMAGES, "image_of_caption": torch.arange(4)},
        "reuse_vision": {"model": accelerated},
        "save_crossget": {"model": accelerated, "save_directory": folder},
        "trace_merges": {"model": accelerated},
        "unsupported_reason": {"model": stock},
        "CompactBatchSampler": {"lengths": [3, 1, 2], "max_rows": 2},
        "VisionCache": {"max_bytes": 2**20},
        "method_names": {},
    }
    return calls.get(name, {})


def entries() -> list[str]:
    return [name for name in mllm_crossget.__all__ if name != "ReductionConfig"]


def parameters(function: Callable[..., Any]) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [one.name for one in inspect.signature(function).parameters.values() if one.kind in kinds]


CHANGE_NOTHING = ("compact_lengths", "generate_in_batches", "save_crossget", "trace_merges")
CASES = [(name, argument) for name in entries() for argument in parameters(getattr(mllm_crossget, name))]


def call(name: str, arguments: dict[str, Any]) -> str | None:
    """What goes wrong with a call: an error of another kind, or one that says nothing."""
    try:
        found = getattr(mllm_crossget, name)(**arguments)
        if isinstance(found, AbstractContextManager):
            with found:
                pass
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        # a RuntimeError of ours is about threads; torch's own about shapes comes too late
        too_late = isinstance(error, RuntimeError) and "thread" not in str(error)
        if too_late or len(str(error)) < 15 or any(words in str(error) for words in PYTHONS_OWN):
            return f"{type(error).__name__}: {str(error)[:120]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"
    return None


@pytest.mark.parametrize(("name", "argument"), CASES, ids=lambda value: str(value))
def test_every_argument_of_every_function(
    name: str, argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a path that is taken is written to
    good = good_arguments(name, tmp_path)
    given = good.get("model")
    before = fingerprint(given) if name in CHANGE_NOTHING and argument != "model" else None
    problems = []
    for kind, value in WRONG.items():
        problem = call(name, {**good, argument: value})
        if problem is not None:
            problems.append(f"{name}({argument}={kind}): {problem}")
    assert not problems, "\n".join(problems)
    if before is not None:
        assert_identical(fingerprint(given), before)


@pytest.mark.parametrize("method", METHODS)
def test_every_field_of_every_method_leaves_the_model(method: str) -> None:
    """A refused setting changes nothing; a taken one is undone by the next."""
    target = accelerate_mllm(tiny_llava("siglip", layers=2, text_layers=3), keep_ratio=0.6)
    before, problems = fingerprint(target), []
    settings = target.__dict__["_mllm_crossget"].method
    for name, (kind, value) in itertools.product(METHODS[method].__dataclass_fields__, WRONG.items()):
        try:
            accelerate_mllm(target, method=method, **{name: value})
        except (ValueError, TypeError) as error:
            if not any(word in str(error) for word in (name, "dial", "merge")):
                problems.append(f"{name}={kind}: {error}"[:200])
        else:
            accelerate_mllm(target, settings)
    assert not problems, "\n".join(problems)
    assert_identical(fingerprint(target), before)
