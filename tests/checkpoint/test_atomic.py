"""Files are whole or as they were: a kill at every step, a full disk, a reader beside a writer, torn lines of logs."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from mllm_crossget import CrossGetConfig, accelerate_mllm, load_crossget, save_crossget
from mllm_crossget.files.atomic_files import append_lines, read_lines, remove_stale, replaced, write_bytes, write_text
from mllm_crossget.hooks.ground.state import handle_of, live_cross_tokens
from mllm_crossget.training.checkpoints import checkpoint_problem
from mllm_crossget.training.data import bad_samples
from tests.helpers.tiny import tiny_llava

CONFIG = "crossget_config.json"


def with_value(value: float, keep_ratio: float):
    model = accelerate_mllm(tiny_llava(), keep_ratio=keep_ratio)
    with torch.no_grad():
        for module in live_cross_tokens(model).values():
            module.weight.fill_(value)
    return model


def pair(folder: Path) -> tuple[float, float]:
    model = load_crossget(tiny_llava(), folder)
    values = {float(one) for module in live_cross_tokens(model).values() for one in module().unique()}
    assert len(values) == 1
    return handle_of(model).method.keep_ratio, values.pop()


STEPS = {"write": (Path, "write_bytes"), "open": (Path, "open"), "replace": (os, "replace"), "sync": (os, "fsync"),
         "remove": (Path, "unlink")}  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_step_leaves_a_whole_pair(step, tmp_path) -> None:
    save_crossget(with_value(1, 0.5), tmp_path)
    old, new = pair(tmp_path), with_value(2, 0.75)
    target, name = STEPS[step]
    for which in range(20):
        child = os.fork()
        if child == 0:
            original, calls = getattr(target, name), [0]

            def killed(*args, _original=original, _calls=calls, _which=which, **kwargs):
                _calls[0] += 1
                if _calls[0] > _which:
                    os.kill(os.getpid(), signal.SIGKILL)
                return _original(*args, **kwargs)

            setattr(target, name, killed)
            save_crossget(new, tmp_path)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert pair(tmp_path) in (old, (0.75, 2.0))
        if status == 0:
            break
    assert status == 0
    assert pair(tmp_path) == (0.75, 2.0)
    assert len(list((tmp_path / "crossget_weights").glob("[0-9a-f]*"))) <= 2  # the new one, and an old one of a kill


def test_equal_tokens_have_one_file_name(tmp_path) -> None:
    """Else every save that a kill cuts off may leave a file of its own."""
    model = with_value(1, 0.5)
    names = set()
    for number in range(12):
        save_crossget(model, tmp_path / str(number))
        names |= {path.name for path in (tmp_path / str(number) / "crossget_weights").iterdir()}
    assert len(names) == 1


@pytest.mark.parametrize("which", [0, 1])
def test_a_full_disk_is_an_os_error_with_the_path(which, tmp_path, monkeypatch) -> None:
    save_crossget(with_value(1, 0.5), tmp_path)
    new, original, calls = with_value(2, 0.75), Path.write_bytes, []

    def full(self, data):
        calls.append(self)
        if len(calls) <= which:
            return original(self, data)
        original(self, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(path.name for path in tmp_path.rglob("*"))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=f"{tmp_path}.*No space left") as caught:
        save_crossget(new, tmp_path)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert pair(tmp_path) == (0.5, 1.0)
    left = sorted(path.name for path in tmp_path.rglob("*"))
    assert [name for name in left if name.endswith(".json") or ".tmp" in name] == [CONFIG]
    assert len(left) == len(before) + which


def test_a_reader_beside_a_writer_sees_pairs(tmp_path) -> None:
    models = [with_value(1, 0.5), with_value(2, 0.75)]
    save_crossget(models[0], tmp_path)
    stop, seen = threading.Event(), set()

    def write() -> None:
        while not stop.is_set():
            for model in models:
                save_crossget(model, tmp_path)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(15):
            seen.add(pair(tmp_path))
    finally:
        stop.set()
        writer.join()
    assert seen <= {(0.5, 1.0), (0.75, 2.0)}


def test_settings_and_weights_of_different_saves_are_refused(tmp_path) -> None:
    save_crossget(with_value(1, 0.5), tmp_path / "a")
    save_crossget(with_value(2, 0.75), tmp_path / "b")
    (weights,) = (tmp_path / "a/crossget_weights").iterdir()
    (other,) = (tmp_path / "b/crossget_weights").iterdir()
    weights.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match="different saves"):
        load_crossget(tiny_llava(), tmp_path / "a")
    assert "different saves" in checkpoint_problem_of_pair(tmp_path / "a")


def checkpoint_problem_of_pair(folder: Path) -> str:
    (folder / "trainer_state.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    return str(checkpoint_problem(folder))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "crossget_weights/../x.safetensors", 3, ""])
def test_settings_name_files_beside_them_only(name, tmp_path) -> None:
    save_crossget(with_value(1, 0.5), tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    values["weights"]["file"] = name
    (tmp_path / CONFIG).write_text(json.dumps(values))
    with pytest.raises(ValueError, match="does not name a file"):
        load_crossget(tiny_llava(), tmp_path)


def test_other_settings_keep_the_weights(tmp_path) -> None:
    save_crossget(with_value(1, 0.5), tmp_path)
    CrossGetConfig(keep_ratio=0.25).save_pretrained(tmp_path)
    assert pair(tmp_path) == (0.25, 1.0)


def test_saving_again_removes_the_file_before(tmp_path) -> None:
    for value in (1, 2, 2):
        save_crossget(with_value(value, 0.5), tmp_path)
    assert len(list((tmp_path / "crossget_weights").iterdir())) == 1
    save_crossget(accelerate_mllm(tiny_llava(), method="tome"), tmp_path)
    assert not list((tmp_path / "crossget_weights").iterdir())


def test_a_shard_reader_finds_the_stock_weights_alone(tmp_path) -> None:
    with_value(1, 0.5).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]


def test_files_keep_mode_and_link(tmp_path) -> None:
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    write_text(real, "a")
    plain = tmp_path / "plain"
    plain.write_text("")
    assert real.stat().st_mode == plain.stat().st_mode
    real.chmod(0o640)
    link.symlink_to(real)
    write_bytes(link, b"b")
    assert link.is_symlink()
    assert (real.read_bytes(), real.stat().st_mode & 0o777) == (b"b", 0o640)


def test_an_error_in_the_block_leaves_the_file(tmp_path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(TypeError), replaced(tmp_path / "a.txt") as new, new.open("w") as file:
        print("half", 1, sep=b"", file=file)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_where_nothing_can_be_written(tmp_path) -> None:
    write_text(tmp_path / "file", "")
    for path in (tmp_path / "file" / "below.txt", tmp_path):
        with pytest.raises(OSError, match=str(path)):
            write_text(path, "a")
        with pytest.raises(OSError, match=str(path)):
            append_lines(path, [1])
    write_text("/dev/null", "a")


def test_leftovers_of_a_kill_go_after_an_hour(tmp_path) -> None:
    for name, age in (("old.tmp", 7200), ("new.tmp", 10), ("kept", 7200)):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, times=(os.stat(tmp_path).st_mtime - age,) * 2)
    remove_stale(tmp_path, "*.tmp")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "new.tmp"]


@pytest.mark.parametrize("torn", [b'{"id": "b", "rea', '{"id": "é'.encode()[:-1], b"\x00\x00"])
def test_a_torn_line_is_left_out_and_the_next_is_whole(torn, tmp_path) -> None:
    file = tmp_path / "bad.jsonl"
    append_lines(file, [{"id": "a", "reason": "x"}])
    with file.open("ab") as raw:
        raw.write(torn)
    with pytest.warns(UserWarning, match="1 of 2 lines are not whole"):
        assert bad_samples(file) == {"a": "x"}
    append_lines(file, [{"id": "c", "reason": "z"}])
    with pytest.warns(UserWarning, match="1 of 3 lines"):
        assert bad_samples(file) == {"a": "x", "c": "z"}


def test_lines_of_several_processes_are_whole(tmp_path) -> None:
    path, children = tmp_path / "log.jsonl", []
    for _ in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            for number in range(50):
                append_lines(path, [{"n": number, "x": "y" * 300}])
            os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert len(read_lines(path)) == 100
