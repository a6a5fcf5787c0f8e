"""A process that is killed in mid-save, folders that take no file, disks that are full.

The files are the old or the new ones, and the error is an ``OSError`` that names the path. The kills, the permissions
and the limits are real, in child processes.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from mllm_crossget import CrossGetConfig, accelerate_mllm, load_crossget, save_crossget
from mllm_crossget.files.atomic_files import append_lines, read_lines, write_bytes
from mllm_crossget.hooks.ground.state import handle_of, live_cross_tokens
from tests.helpers.exploring import SEED, in_parts
from tests.helpers.tiny import tiny_llava

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
CONFIG = "crossget_config.json"
NOBODY = 65534


def with_value(value: float, keep_ratio: float) -> nn.Module:
    model = accelerate_mllm(tiny_llava(), keep_ratio=keep_ratio)
    with torch.no_grad():
        for module in live_cross_tokens(model).values():
            module.weight.fill_(value)
    return model


def pair(folder: Path) -> tuple[float, float]:
    model = load_crossget(tiny_llava(), folder)
    (value,) = {float(one) for module in live_cross_tokens(model).values() for one in module().detach().unique()}
    return handle_of(model).method.keep_ratio, value


def in_child(act: Callable[[], object]) -> int:
    """The process id of a child that does something again and again until it is killed."""
    child = os.fork()
    if child == 0:
        try:
            while True:
                act()
        finally:
            os._exit(1)
    return child


def killed_after(child: int, seconds: float) -> None:
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it ended by itself"


@in_parts(short=6, long=200, parts=2)
def test_a_kill_at_a_random_point_leaves_one_save_whole(examples: int, part: int, tmp_path: Path) -> None:
    models, wait = [with_value(1, 0.5), with_value(2, 0.75)], random.Random(SEED + part)
    save_crossget(models[0], tmp_path)
    seen = set()

    def save() -> None:
        for model in models:
            save_crossget(model, tmp_path)

    for _ in range(examples):
        killed_after(in_child(save), wait.uniform(0.0, 0.08))
        seen.add(pair(tmp_path))
    assert seen <= {(0.5, 1.0), (0.75, 2.0)}


@in_parts(short=4, long=100, parts=1)
def test_a_kill_while_lines_are_added_costs_one_line_at_most(examples: int, part: int, tmp_path: Path) -> None:
    log, wait = tmp_path / "log.jsonl", random.Random(SEED + part)
    append_lines(log, [{"first": True}])
    for _ in range(examples):
        killed_after(in_child(lambda: append_lines(log, [{"text": "x" * 5000}] * 20)), wait.uniform(0.0, 0.02))
    lines = read_lines(log)
    assert lines[0] == {"first": True}
    assert {len(line["text"]) for line in lines[1:]} <= {5000}


def outcome(act: Callable[[], object]) -> str:
    """What a child process says of an attempt: "done", or the error with its number and path."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            act()
            text = "done"
        except OSError as error:
            text = f"OSError {error.errno} {error}"
        except BaseException as error:
            text = f"{type(error).__name__} {error}"
        os.write(writer, text.encode()[:4000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        text = said.read()
    os.waitpid(child, 0)
    return text


def writers(model: nn.Module, folder: Path) -> dict[str, Callable[[], object]]:
    return {
        "save_crossget": lambda: save_crossget(model, folder),
        "settings": lambda: CrossGetConfig(keep_ratio=0.25).save_pretrained(folder),
        "bytes": lambda: write_bytes(folder / CONFIG, b"x" * 10_000),
        "lines": lambda: append_lines(folder / "log.jsonl", [{"text": "x" * 10_000}]),
    }


@pytest.mark.parametrize("writer", ["save_crossget", "settings", "bytes", "lines"])
def test_a_read_only_folder(writer: str, tmp_path: Path) -> None:
    folder = tmp_path / "read only"
    save_crossget(with_value(1, 0.5), folder)
    act = writers(with_value(2, 0.75), folder)[writer]
    for path in [folder, *folder.rglob("*"), *tmp_path.parents]:
        if path.is_dir() and path.is_relative_to(tmp_path):
            path.chmod(0o555)
    opened = [path for path in (tmp_path, *tmp_path.parents) if not path.stat().st_mode & 0o005]
    modes = [path.stat().st_mode for path in opened]

    def as_nobody() -> None:
        if os.getuid() == 0:  # who may write anywhere
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        act()

    try:
        for path in opened:
            path.chmod(path.stat().st_mode | 0o055)
        said = outcome(as_nobody)
    finally:
        for path, mode in zip(opened, modes, strict=True):
            path.chmod(mode)
        folder.chmod(0o755)
    assert said.startswith(f"OSError {errno.EACCES}"), said
    assert str(folder) in said
    assert pair(folder) == (0.5, 1.0)


@pytest.mark.parametrize("writer", ["save_crossget", "bytes", "lines"])
def test_a_disk_without_room(writer: str, tmp_path: Path) -> None:
    """A limit on the size of files is what a process can set for itself; the error is of the same kind."""
    save_crossget(with_value(1, 0.5), tmp_path)
    act = writers(with_value(2, 0.75), tmp_path)[writer]

    def within_a_limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
        act()

    said = outcome(within_a_limit)
    assert said.startswith(f"OSError {errno.EFBIG}"), said
    assert str(tmp_path) in said
    assert pair(tmp_path) == (0.5, 1.0)
    assert not [path for path in tmp_path.rglob("*") if ".tmp" in path.name]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_training_that_is_killed_goes_on(tmp_path: Path) -> None:
    """The command is killed at random points and started again, until it has ended by itself."""
    import json
    import subprocess

    from PIL import Image

    Image.new("RGB", (96, 96), (200, 9, 9)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nhow many?"}, {"from": "gpt", "value": "three"}]
    (tmp_path / "data.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}] * 4))
    options = {
        "model": "embedded",
        "train_data": tmp_path / "data.json",
        "output_dir": tmp_path / "out",
        "max_steps": 30,
        "save_steps": 1,
        "per_device_train_batch_size": 1,
        "use_cpu": "true",
        "lora_r": 2,
        "report_to": "none",
        "disable_tqdm": "true",
    }
    words = [sys.executable, "-m", "mllm_crossget", "train"]
    words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    wait, environment = random.Random(SEED), {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(40):
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        try:
            said = process.communicate(timeout=wait.uniform(15, 45))[0]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            continue
        assert process.returncode == 0, said[-2000:]
        break
    else:
        pytest.fail("it never came to its end")
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 30
