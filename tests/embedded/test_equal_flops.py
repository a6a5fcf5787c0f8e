"""The table of accuracies at equal FLOPs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def row(setting: str, gflops: float, accuracy: float) -> dict[str, Any]:
    return {"setting": setting, "gflops": gflops, "score": {"overall": {"accuracy": accuracy}}}


def test_methods_are_compared_where_they_cost_what_the_default_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import equal_flops_table

    rows = [row("untouched", 1.0, 0.9), row("crossget 0.5", 0.6, 0.8), row("crossget 0.25", 0.4, 0.7)]
    others = [row("tome 0.5", 0.5, 0.6), row("crossget-trained 0.5", 0.4, 0.99)]
    lines = equal_flops_table.equal_flops_table({"rows": [*rows, *others]}).splitlines()
    assert lines[0] == "| method | 0.60 GFLOPs | 0.40 GFLOPs |"
    assert lines[2] == "| crossget | 80.0% | 70.0% |"
    assert lines[3] == "| tome | 66.0% | – |"  # 0.6 + 0.3 * 0.1 / 0.5; never run below 0.5 GFLOPs
    assert len([line for line in lines if line.startswith("|")]) == 4
