"""The table, the plot and the paired comparison from result files; docs/evaluation.md has what the files give."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from mllm_crossget.arithmetic.intervals import bootstrap_interval
from mllm_crossget.integrations.lmms_eval.results import compare
from tests.helpers.evaluation import ROOT

SCRIPT = ROOT / "eval" / "leaderboard.py"
FOLDER = "eval/results/embedded"


@pytest.fixture(scope="module")
def leaderboard():
    spec = importlib.util.spec_from_file_location("leaderboard", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["leaderboard"] = module  # for its dataclass
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))  # it imports the file beside it
        spec.loader.exec_module(module)
    return module


def result(setting, scores, task="embedded_vqa", metric="exact_match", digest="same", **costs):
    low, high = bootstrap_interval(np.array(scores, dtype=float))
    return {
        "format_version": 1,
        "config": {"tasks": task, "setting": setting, "batch_size": 8},
        "questions": len(scores),
        "metrics": {metric: {"value": float(np.mean(scores)), "low": low, "high": high}},
        "costs": {"requests": len(scores), "gflops_per_request": 1.0, "visual_tokens_per_request": 72.0, **costs},
        "environment": {"device": "cpu", "threads": 1, "torch": "2", "transformers": "5", "lmms_eval": "0.7.3"},
        "questions_digest": digest,
        "doc_ids": " ".join(map(str, range(len(scores)))),
        "scores": {metric: " ".join(f"{score:g}" for score in scores)},
    }


def test_the_pages_table_is_what_the_files_give():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--folder", FOLDER, "--readme", "docs/evaluation.md", "--check"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, (
        f"python eval/leaderboard.py --folder {FOLDER} --readme docs/evaluation.md\n{done.stderr}"
    )


def test_a_changed_result_changes_the_table(leaderboard, tmp_path):
    """The check above can fail."""
    (tmp_path / leaderboard.FILE).write_text((ROOT / FOLDER / leaderboard.FILE).read_text())
    table = leaderboard.markdown(leaderboard.load(tmp_path))
    assert table in (ROOT / "docs/evaluation.md").read_text()
    changed = leaderboard.read_runs(tmp_path)["embedded_vqa.none"]
    changed["metrics"]["exact_match"]["value"] -= 0.01
    (tmp_path / "embedded_vqa.none.json").write_text(json.dumps(changed))  # a run made again
    assert leaderboard.markdown(leaderboard.load(tmp_path)) not in (ROOT / "docs/evaluation.md").read_text()


def test_rows_are_in_order_and_a_column_may_average_tasks(leaderboard, tmp_path):
    settings = {"tome keep_ratio=0.25": 0.5, "tome keep_ratio=0.5": 0.25, "none": 0.75}
    for number, (setting, right) in enumerate(settings.items()):
        for add, task in enumerate(("pope_random", "pope_pop", "pope_adv")):
            scores = [1.0] * int(right * 20 + add) + [0.0] * int(20 - right * 20 - add)
            found = result(setting, scores, task, "pope_f1_score")
            (tmp_path / f"{number}{task}.json").write_text(json.dumps(found))
    lines = leaderboard.markdown(leaderboard.load(tmp_path)).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == [
        "| untouched",
        "| tome keep_ratio=0.5",
        "| tome keep_ratio=0.25",
    ]
    assert "| POPE |" in lines[0]
    assert "| 80.0 |" in lines[2]  # mean of 75, 80 and 85 %


def test_pictures_and_html(leaderboard, tmp_path):
    for number, setting in enumerate(("none", "tome keep_ratio=0.5")):
        (tmp_path / f"{number}.json").write_text(json.dumps(result(setting, [1.0, 0.0] * 10)))
    results = leaderboard.load(tmp_path)
    leaderboard.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    page = leaderboard.as_html(results)
    assert page.count("<tr>") == 3
    assert "tome keep_ratio=0.5</td>" in page


def test_paired_bootstrap_uses_the_pairs():
    """The same questions wrong in both runs: the difference is known far better than either accuracy."""
    generator = np.random.default_rng(1)
    one = (generator.random(400) < 0.6).astype(float)
    other = one.copy()
    other[:8] = 1.0
    found = compare(result("a", one), result("b", other), "exact_match")
    assert found["difference"] == pytest.approx((other - one).mean())
    assert 0 <= found["low"] <= found["difference"] <= found["high"] < 0.03
    low, high = bootstrap_interval(one)
    assert high - low == pytest.approx(2 * 1.96 * one.std() / 20, rel=0.1)  # the normal approximation


def test_other_questions_are_not_compared():
    with pytest.raises(ValueError, match="different questions"):
        compare(result("a", [1.0, 0.0]), result("b", [1.0, 0.0], digest="other"), "exact_match")
    with pytest.raises(ValueError, match="no score for every question"):
        compare(result("a", [1.0]), result("b", [1.0]), "f1")
