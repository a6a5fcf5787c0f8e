"""What ``mllm-crossget demo`` stores."""

from __future__ import annotations

import json

import pytest

from mllm_crossget.embedded.demo import DemoOptions, run


def test_right_and_wrong_answers_are_stored_for_paired_comparisons(tmp_path):
    pytest.importorskip("matplotlib")
    run(DemoOptions(["tome"], [0.125], limit=9, rounds=1, examples=0, output_dir=str(tmp_path)))
    rows = json.loads((tmp_path / "demo.json").read_text())["rows"]
    assert [row["setting"] for row in rows] == ["untouched", "tome 0.125"]
    for row in rows:
        assert len(row["right"]) == 9
        assert row["right"].count("1") == row["score"]["overall"]["right"]
    assert "1" in rows[0]["right"]


def test_json_alone_goes_to_the_output(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    options = DemoOptions(["tome"], [0.125], limit=3, rounds=1, examples=1, output_dir=str(tmp_path), json=True)
    run(options)
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert report == json.loads((tmp_path / "demo.json").read_text())
    assert report["questions"] == 3
    assert "tome 0.125: " in said.err
    assert "held-out questions" in said.err
