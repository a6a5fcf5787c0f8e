"""From a user's file to questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mllm_crossget.compare.samples import read_sample
from mllm_crossget.files.records import BadSampleError, load_records


def test_every_answered_turn_is_a_question(data: Path) -> None:
    sample = read_sample(load_records(data), "data", None, 0, quiet=True)
    assert (len(sample.questions), sample.without_picture) == (9, 1)
    first, second, third = sample.questions[:3]
    assert (first.identity, second.identity, third.identity) == ("q0", "q0.2", "q1")
    assert second.answer == "7"
    assert [message["role"] for message in second.messages] == ["user", "assistant", "user"]
    assert first.group == second.group == "0.png"
    assert {question.group for question in sample.questions} == {"0.png", "1.png"}
    assert second.text == third.text
    assert first.images()[0].size == (96, 96)
    assert first.images(blank=True)[0].getcolors() == [(96 * 96, (122, 116, 104))]


def test_a_drawn_sample_keeps_the_order_and_follows_the_seed(data: Path) -> None:
    records = load_records(data)
    drawn = {seed: read_sample(records, "data", 4, seed, quiet=True) for seed in (0, 1, 2)}
    ids = {seed: [question.identity for question in sample.questions] for seed, sample in drawn.items()}
    assert ids[0] == [question.identity for question in read_sample(records, "data", 4, 0, quiet=True).questions]
    assert all(len(found) == 4 and found == sorted(found) for found in ids.values())
    assert len({tuple(found) for found in ids.values()}) > 1
    assert len({sample.digest for sample in drawn.values()}) == len({tuple(found) for found in ids.values()})


def test_the_digest_is_of_pixels_too(data: Path, tmp_path: Path) -> None:
    for name in ("data.json", "0.png", "1.png"):
        (tmp_path / name).write_bytes((data.parent / name).read_bytes())
    same = read_sample(load_records(tmp_path / "data.json"), "data", None, 0, quiet=True)
    Image.new("RGB", (96, 96)).save(tmp_path / "1.png")
    other = read_sample(load_records(tmp_path / "data.json"), "data", None, 0, quiet=True)
    assert same.digest == read_sample(load_records(data), "data", None, 0, quiet=True).digest != other.digest


def test_a_broken_picture_is_named_before_anything_runs(data: Path, tmp_path: Path) -> None:
    rows = json.loads(data.read_text())
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes((data.parent / name).read_bytes())
    (tmp_path / "1.png").write_bytes(b"no picture")
    (tmp_path / "data.json").write_text(json.dumps(rows))
    with pytest.raises(BadSampleError, match=r"its image cannot be read: cannot identify image file"):
        read_sample(load_records(tmp_path / "data.json"), "data", None, 0, quiet=True)
    (tmp_path / "data.json").write_text(json.dumps(rows[:1]))
    with pytest.raises(ValueError, match="no sample with a picture"):
        read_sample(load_records(tmp_path / "data.json"), "data.json", None, 0, quiet=True)
