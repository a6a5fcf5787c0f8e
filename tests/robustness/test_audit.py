"""What the package's own lines may not do: run code that comes from a file, or speak to a network on their own."""

from __future__ import annotations

import ast
import functools
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mllm_crossget
from mllm_crossget import accelerate_mllm, load_crossget, restore_mllm, save_crossget
from mllm_crossget.embedded import batch_inputs, held_out_questions, load_embedded

PACKAGE = Path(mllm_crossget.__file__).parent
SCRIPTS = PACKAGE.parent / "scripts"
MODULES = {
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "urllib",
    "requests",
    "http",
    "socket",
    "ftplib",
    "wandb",
}
STARTS_PROCESSES = PACKAGE / "integrations" / "lmms_eval"  # one per run of lmms-eval
ASKS_SERVERS = PACKAGE / "benchmark" / "serving_load.py"  # of the user's own naming


def sources() -> list[Path]:
    return [*sorted(PACKAGE.rglob("*.py")), *sorted(SCRIPTS.glob("*.py"))]


@functools.cache
def tree(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text())))


def nodes(file: Path, kind: type[ast.AST]) -> Iterator[Any]:
    return (node for node in tree(file) if isinstance(node, kind))


def imported(file: Path) -> set[str]:
    names = {alias.name.partition(".")[0] for node in nodes(file, ast.Import) for alias in node.names}
    return names | {str(node.module).partition(".")[0] for node in nodes(file, ast.ImportFrom)}


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def keyword(node: ast.Call, name: str) -> Any:
    return next((ast.unparse(one.value) for one in node.keywords if one.arg == name), None)


def problems_in(file: Path) -> list[str]:
    found = sorted(imported(file) & (MODULES - {"urllib", "http"} if file == ASKS_SERVERS else MODULES))
    if "subprocess" in imported(file) and not file.is_relative_to(STARTS_PROCESSES):
        found.append("subprocess")
    for node in nodes(file, ast.Call):
        name = called(node)
        if name == "torch.load" and keyword(node, "weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if name in ("eval", "exec", "compile", "os.system", "__import__", "yaml.unsafe_load"):
            found.append(name)
        if name == "yaml.load" and keyword(node, "Loader") is None:
            found.append("yaml.load without a safe loader")
        for word in ("allow_pickle", "trust_remote_code"):
            if keyword(node, word) not in (None, "False"):
                found.append(word)
    return found


def test_no_file_runs_code_that_it_read() -> None:
    found = {file.relative_to(PACKAGE.parent).as_posix(): problems_in(file) for file in sources()}
    assert len(found) > 150
    assert not {file: problems for file, problems in found.items() if problems}


def test_what_is_forbidden_is_found(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(
        "import pickle, subprocess\nfrom urllib import request\ntorch.load(x)\neval(x)\nf(allow_pickle=True)\n"
    )
    assert len(problems_in(file)) == 6


def test_nothing_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a model that is on the disk: no connection is opened, not even tried."""
    tried: list[Any] = []
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, lambda self, *address: tried.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **options: tried.append(address))
    model, processor = load_embedded()
    inputs = batch_inputs(processor, held_out_questions(1))
    accelerate_mllm(model, keep_ratio=0.5)
    with torch.no_grad():
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    save_crossget(model, tmp_path)
    load_crossget(restore_mllm(model), tmp_path)
    model.save_pretrained(tmp_path / "model")
    assert not tried
