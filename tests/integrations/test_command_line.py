"""The unmodified lmms-eval command line on the embedded model: same answers whatever the batch, processes or mode."""

from __future__ import annotations

import importlib.util
import json

import pytest

from mllm_crossget import accelerate_mllm
from mllm_crossget.embedded import WEIGHTS_FOLDER, answer, held_out_questions, load_embedded, score
from tests.helpers.evaluation import Output, broken_model

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install 'mllm-crossget[eval]'")

from tests.helpers.prepared_cache import prepare_public_tasks

pytestmark = pytest.mark.timeout(1000)
LIMIT = 24
BATCHES = (1, 3, 8)
TASKS = {"embedded_vqa": False, "embedded_caption": True}  # name -> whether it asks for captions
BUILT_IN = ("pope", "gqa")
LOCAL = ("mmbench_cn_dev_static", "seedbench_image", "flickr30k_caption_choice", "coco2017_caption_choice")
HALF = "pretrained=embedded,keep_ratio=0.5"


@pytest.fixture(scope="module")
def outputs(lmms_eval, tmp_path_factory):
    """All runs that need no process of their own, by name."""
    folder = tmp_path_factory.mktemp("runs")
    prepare_public_tasks(lmms_eval.home, 12)
    both = ",".join(TASKS)
    runs = {f"batch {size}": (HALF, {"tasks": both, "batch_size": size, "limit": LIMIT}) for size in BATCHES}
    baseline = {"tasks": ",".join(["embedded_vqa", *BUILT_IN, *LOCAL]), "batch_size": 8, "limit": 12}
    runs["none"] = ("pretrained=embedded,reduction=none", baseline)
    if importlib.util.find_spec("decord"):
        upstream = f"pretrained={WEIGHTS_FOLDER},device_map=cpu,dtype=float32"
        runs["upstream"] = (upstream, {**baseline, "tasks": "embedded_vqa", "batch_size": 1, "model": "llava_hf"})
    entries = [lmms_eval.entry(folder / name, args, **settings) for name, (args, settings) in runs.items()]
    lmms_eval(entries, folder)
    return {name: Output(folder / name) for name in runs}


def asked(captions: bool):
    return [question for question in held_out_questions(400) if (question.kind == "caption") == captions][:LIMIT]


@pytest.mark.parametrize("task", TASKS)
def test_the_batch_size_changes_no_answer(outputs, task):
    first, *others = (outputs[f"batch {size}"].answers(task) for size in BATCHES)
    assert len(first) == LIMIT
    assert len(set(first)) > 3
    assert all(answers == first for answers in others)


@pytest.mark.parametrize("task", TASKS)
def test_score_equals_our_own_evaluators(outputs, task):
    model, processor = load_embedded()
    questions = asked(TASKS[task])
    answers = answer(accelerate_mllm(model, keep_ratio=0.5), processor, questions)
    for size in BATCHES:
        report = outputs[f"batch {size}"].report
        assert report["results"][task]["exact_match,none"] == score(questions, answers).overall.share
    assert outputs["batch 1"].answers(task) == answers
    assert [sample["input"] for sample in outputs["batch 1"].samples(task)] == [question.text for question in questions]


def test_costs_are_in_lmms_evals_own_results(outputs):
    costs = outputs["batch 8"].report["throughput"]
    assert costs["avg_visual_tokens_per_request"] == 72
    assert outputs["none"].report["throughput"]["avg_visual_tokens_per_request"] == 144
    parts = [costs[f"avg_{part}_s_per_request"] for part in ("encoder", "prefill", "decode")]
    assert all(part > 0 for part in parts)
    assert sum(parts) == pytest.approx(costs["avg_seconds_per_request"])
    assert sum(parts) * 2 * LIMIT == pytest.approx(costs["total_elapsed_time"])
    assert costs["avg_time_to_first_token_s"] == pytest.approx(sum(parts[:2]) * 8)  # batches of 8, all full
    untouched = outputs["none"].report["throughput"]["avg_gflops_per_request"]
    assert 0.6 * untouched < costs["avg_gflops_per_request"] < 0.8 * untouched
    assert 0.1 < costs["avg_peak_memory_gb"] < 20


def test_the_baseline_answers_as_lmms_evals_own_model(outputs):
    if "upstream" not in outputs:
        pytest.skip("lmms-eval's own llava_hf needs the package decord")
    assert outputs["upstream"].answers("embedded_vqa") == outputs["none"].answers("embedded_vqa")
    assert len(set(outputs["none"].answers("embedded_vqa"))) > 3


def test_built_in_tasks_run_unmodified_and_offline(outputs):
    report = outputs["none"].report["results"]
    samples = {task: outputs["none"].samples(task) for task in ("pope", "gqa")}
    assert [len(found) for found in samples.values()] == [12, 12]
    assert all(sample["input"].endswith("single word or phrase.") for sample in samples["pope"])
    answers = {task: [sample["filtered_resps"].strip() for sample in found] for task, found in samples.items()}
    for task, metric in (("pope", "pope_accuracy"), ("gqa", "exact_match")):
        right = sum(found == sample["target"] for found, sample in zip(answers[task], samples[task], strict=True))
        assert report[task][f"{metric},none"] == right / 12  # the model has not learned to answer in a single word
        assert len(set(answers[task])) > 2


def test_local_tasks_on_public_data_run_offline(outputs):
    """The embedded model knows no letters, so that only what is asked and counted can be looked at."""
    report = outputs["none"].report
    asked = {task: outputs["none"].samples(task) for task in LOCAL}
    assert [len(samples) for samples in asked.values()] == [12, 8, 12, 12]  # no video of SEED-Bench
    assert report["results"]["mmbench_cn_dev_static"]["gpt_eval_score,none"] >= 0
    for task in LOCAL[1:]:
        right = [sample["exact_match"] for sample in asked[task]]
        assert report["results"][task]["exact_match,none"] == pytest.approx(sum(right) / len(right))
    choice = asked["flickr30k_caption_choice"][5]
    assert choice["target"] == "B"
    assert "A. caption 6\nB. caption 5\nC. caption 7\nD. caption 8\n" in choice["input"]


def test_two_processes_score_as_one(lmms_eval, outputs, tmp_path):
    """31 questions: one process gets 16 of them, the other 15 and one that only fills up."""
    settings = {"tasks": "embedded_vqa", "batch_size": 8, "limit": 31}
    entry = lmms_eval.entry(tmp_path / "two", f"{HALF},journal={tmp_path / 'journal'}", **settings)
    lmms_eval([entry], tmp_path, processes=2)
    two = Output(tmp_path / "two")
    assert two.answers("embedded_vqa")[:LIMIT] == outputs["batch 8"].answers("embedded_vqa")
    questions = [question for question in held_out_questions(400) if question.kind != "caption"][:31]
    model, processor = load_embedded()
    answers = answer(accelerate_mllm(model, keep_ratio=0.5), processor, questions)
    assert two.report["results"]["embedded_vqa"]["exact_match,none"] == score(questions, answers).overall.share
    logs = sorted((tmp_path / "journal").glob("answers.rank*.jsonl"))
    answered = [
        sum(len(json.loads(line).get("answers", [])) for line in path.read_text().splitlines()) for path in logs
    ]
    assert answered == [16, 15]


def test_a_failing_generate_ends_the_run(lmms_eval, tmp_path):
    """Also where lmms-eval itself would print the error and exit with status 0."""
    model = broken_model(tmp_path / "broken")
    settings = {"tasks": "embedded_vqa", "batch_size": 4, "limit": 8, "verbosity": "INFO"}
    entry = lmms_eval.entry(tmp_path / "out", f"pretrained={model},keep_ratio=0.5", **settings)
    done = lmms_eval([entry], tmp_path, check=False)
    assert done.returncode == 1
    assert "image placeholders for 4 image(s)" in done.stderr
    assert not list(tmp_path.rglob("*_results.json"))
