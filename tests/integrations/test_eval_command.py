"""``mllm-crossget eval`` from an experiment file to result files: resumed, stopped by an error, compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from mllm_crossget import cli
from mllm_crossget.integrations.lmms_eval.experiment import EvalOptions, planned
from mllm_crossget.integrations.lmms_eval.results import read_result
from tests.helpers.evaluation import ROOT, broken_model, child_environment

pytestmark = pytest.mark.timeout(1000)
QUESTIONS = 40
NAMES = ("embedded_vqa.none", "embedded_vqa.crossget_keep_ratio_0.5")


@pytest.fixture
def experiment(tmp_path):
    """An experiment file: the baseline and one setting, one question in a batch."""
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump([{"tasks": "embedded_vqa", "batch_size": 1}]))
    options = {"suite": str(suite), "keep_ratios": [0.5], "output_dir": str(tmp_path / "out"), "device": "cpu"}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump({**options, "limit": QUESTIONS}))
    return path


def run(experiment, lmms_eval, monkeypatch, *words):
    monkeypatch.chdir(ROOT)
    for name, value in child_environment(lmms_eval.home).items():
        monkeypatch.setenv(name, value)
    return cli.main(["eval", str(experiment), *words])


def answered(folder, name):
    lines = (folder / "work" / name / "answers" / "answers.rank0.jsonl").read_text().splitlines()
    batches = [json.loads(line) for line in lines[1:]]
    return [tuple(answer["key"]) for batch in batches for answer in batch["answers"]]


def test_a_killed_experiment_goes_on_with_the_batch_in_flight(lmms_eval, experiment, monkeypatch, capsys):
    folder = experiment.parent / "out"
    log = folder / "work" / NAMES[0] / "answers" / "answers.rank0.jsonl"
    command = [sys.executable, "-m", "mllm_crossget", "eval", str(experiment)]
    with subprocess.Popen(
        command, cwd=ROOT, env=child_environment(lmms_eval.home), stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        wait_for_lines(log, 6, process)
        os.killpg(process.pid, signal.SIGKILL)
    done = log.read_text().splitlines(keepends=True)
    done = [line for line in done if line.endswith("\n")]
    assert 6 <= len(done) <= QUESTIONS  # stopped in the middle
    assert not list(folder.glob("*.json"))

    assert run(experiment, lmms_eval, monkeypatch) == 0
    assert log.read_text().splitlines(keepends=True)[: len(done)] == done
    for name in NAMES:
        keys = answered(folder, name)
        assert len(keys) == len(set(keys)) == QUESTIONS

    check_results({name: read_result(folder / f"{name}.json") for name in NAMES})
    written = [(folder / f"{name}.json").stat().st_mtime_ns for name in NAMES]
    assert run(experiment, lmms_eval, monkeypatch) == 0
    assert "2 runs, 2 of them finished" in capsys.readouterr().out
    assert [(folder / f"{name}.json").stat().st_mtime_ns for name in NAMES] == written

    assert run(experiment, lmms_eval, monkeypatch, "--limit", "7") == 2
    assert "another experiment (it differs in limit)" in capsys.readouterr().err


def wait_for_lines(path, count, process, seconds=600):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.is_file() and len(path.read_text().splitlines()) >= count:
            return
        assert process.poll() is None, "the experiment ended before it could be killed"
        time.sleep(0.02)
    raise AssertionError(f"{path} did not get {count} lines")


def check_results(results):
    for result in results.values():
        exact = result["metrics"]["exact_match"]
        scores = [float(word) for word in result["scores"]["exact_match"].split()]
        assert exact["value"] == pytest.approx(sum(scores) / QUESTIONS, abs=1e-6)
        assert exact["low"] < exact["value"] < exact["high"]
        assert result["costs"]["requests"] == QUESTIONS == result["questions"]
        assert {"torch", "transformers", "lmms_eval", "device", "mllm_crossget"} <= result["environment"].keys()
    tokens = [result["costs"]["visual_tokens_per_request"] for result in results.values()]
    assert tokens == [144, 72]


def test_a_failing_run_is_told_and_stops_the_experiment(lmms_eval, experiment, monkeypatch, capsys):
    model = broken_model(experiment.parent / "broken")
    assert run(experiment, lmms_eval, monkeypatch, "--pretrained", str(model), "--no_baseline") == 1
    told = capsys.readouterr().err
    assert "embedded_vqa.crossget_keep_ratio_0.5 failed" in told
    assert "image placeholders for 1 image(s)" in told
    assert not list((experiment.parent / "out").glob("*.json"))


def test_every_setting_on_every_task(experiment):
    options = EvalOptions(suite="eval/suites/embedded.yaml", methods=["crossget", "tome"], keep_ratios=[0.5], rs=[3])
    runs = planned(options)
    assert len(runs) == 5 * 2
    assert [item.setting for item in runs[::2]] == [
        "none",
        "crossget keep_ratio=0.5",
        "crossget r=3",
        "tome keep_ratio=0.5",
        "tome r=3",
    ]
    assert runs[2].entry["model_args"] == "pretrained=embedded,method=crossget,keep_ratio=0.5"
    assert len({item.name for item in runs}) == len(runs)


def test_wrong_experiments_are_refused(tmp_path):
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump([{"tasks": "gqa,pope"}]))
    with pytest.raises(ValueError, match="several tasks"):
        planned(EvalOptions(suite=str(suite)))
    with pytest.raises(ValueError, match="does not exist"):
        planned(EvalOptions(suite="nowhere.yaml"))
    with pytest.raises(ValueError, match="not in"):
        planned(EvalOptions(suite="eval/suites/embedded.yaml", tasks=["gqa"]))
    with pytest.raises(ValueError, match="no suite given"):
        EvalOptions()
    with pytest.raises(ValueError, match="crossget"):
        EvalOptions(suite=str(suite), methods=["crosget"])
    with pytest.raises(ValueError, match="nothing to run"):
        EvalOptions(suite=str(suite), baseline=False)
