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
