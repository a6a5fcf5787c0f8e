"""Suites and experiments name tasks and settings that exist; the local tasks count what they say."""

from __future__ import annotations

import importlib.util

import pytest
import yaml

from mllm_crossget import cli
from mllm_crossget.integrations.lmms_eval import tasks_dir
from mllm_crossget.integrations.lmms_eval.experiment import planned
from tests.helpers.evaluation import ROOT

SUITES = sorted((ROOT / "eval" / "suites").glob("*.yaml"))
EXPERIMENTS = sorted((ROOT / "eval" / "experiments").glob("*.yaml"))


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, tasks_dir() / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_task_of_the_suites_is_known():
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install 'mllm-crossget[eval]'")
    from lmms_eval.tasks import TaskManager

    known = TaskManager("ERROR", include_path=str(tasks_dir())).all_tasks
    assert len(SUITES) == 5
    for path in SUITES:
        tasks = [entry["tasks"] for entry in yaml.safe_load(path.read_text())]
        assert not set(tasks) - set(known), path.name


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_experiments_can_be_planned(path, monkeypatch):
    pytest.importorskip("yaml")
    monkeypatch.chdir(ROOT)
    (options,) = cli.parse_command("eval", cli.COMMANDS["eval"], [str(path)])
    assert planned(options)


def test_letters_and_captions():
    tasks = loaded("standard_tasks")
    doc = {"answer": "B"}
    assert [tasks.first_letter(doc, [text])["exact_match"] for text in ("B", "b. red", "A", "")] == [1, 1, 0, 0]
    assert tasks.first_letter_of_choice({"choice": "C"}, ["C. a dog"])["exact_match"] == 1


def test_caption_scores():
    scenes = loaded("embedded_scenes")
    doc = {"answer": "a red 3 , a blue 4 ."}
    assert scenes.caption_scores(doc, ["a red 3 , a blue 4 ."]) == {"exact_match": 1.0, "digit_f1": 1.0}
    assert scenes.caption_scores(doc, ["a blue 4 ."]) == {"exact_match": 0.0, "digit_f1": pytest.approx(2 / 3)}
    assert scenes.caption_scores(doc, [""])["digit_f1"] == 0.0


def test_static_mmbench():
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install 'mllm-crossget[eval]'")
    row = {"A": "1", "B": "2", "C": "3", "D": "4", "category": "c", "l2-category": "l", "split": "dev"}
    answers = ["B", "B. 2", "答案是 C", "no idea"]
    results = [{**row, "index": i, "answer": "B", "prediction": text} for i, text in enumerate(answers)]
    assert loaded("standard_tasks").mmbench_cn_static(results, None) == 50
