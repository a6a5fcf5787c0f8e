"""The command on the embedded model: what it writes, that it goes on, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mllm_crossget import accelerated, cli
from mllm_crossget.compare.answering import load_answerer
from mllm_crossget.compare.compare_options import CompareOptions
from mllm_crossget.compare.run_costs import counted_costs
from mllm_crossget.compare.samples import read_sample
from mllm_crossget.embedded import answer, held_out_questions, load_embedded
from mllm_crossget.files.atomic_files import read_lines
from mllm_crossget.files.records import load_records

FEW = ["--methods", "tome", "--keep-ratios", "0.25", "--max_new_tokens", "8", "--timed-questions", "2"]


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of two methods."""
    folder = tmp_path_factory.mktemp("results") / "out"
    assert cli.main(["compare", "embedded", str(data), *FEW, "--rounds", "1", "--output-dir", str(folder)]) == 0
    return folder


def runs_of(folder: Path) -> list[tuple[str, dict]]:
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    return [(line["run"], line["result"]) for line in lines]


def test_what_is_written(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["compare.html", "compare.md", "compare.png", "runs.jsonl"]
    runs = runs_of(folder)
    assert [name for name, _ in runs] == [
        "settings", "untouched", "crossget 0.25", "tome 0.25", "blank picture", "times",
    ]  # fmt: skip
    found = dict(runs)
    assert [found[name]["visual_tokens"] for name in ("untouched", "crossget 0.25")] == [144, 36]
    # keys and values, 4 layers, 4 heads of 32 channels, four bytes
    assert found["tome 0.25"]["kv_bytes"] == 36 * 2 * 4 * 4 * 32 * 4
    assert found["untouched"]["gflops"]["total"] == pytest.approx(0.66, abs=0.01)
    assert list(found["times"]["seconds"]) == ["untouched", "crossget 0.25", "tome 0.25"]
    assert "| tome 0.25" in (folder / "compare.md").read_text()


def test_answers_are_those_of_generate(folder: Path) -> None:
    questions = held_out_questions(8)
    model, processor = load_embedded()
    with accelerated(model, method="tome", keep_ratio=0.25):
        expected = answer(model, processor, questions)
    found = dict(runs_of(folder))["tome 0.25"]
    given = [text for index, text in enumerate(found["answers"]) if index != 1]  # the second turn of the first sample
    short = [index for index, question in enumerate(questions) if question.kind not in ("caption", "sum")]
    assert [given[index] for index in short] == [expected[index] for index in short]
    right = "".join("01"[text == question.answer] for text, question in zip(expected, questions, strict=True))
    assert "".join(found["exact"][index + (index > 0)] for index in short) == "".join(right[index] for index in short)


def test_finished_runs_are_not_made_again(folder: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "runs.jsonl").read_text()
    words = ["compare", "embedded", str(data), "--output_dir", str(folder), "--json", "--rounds", "1", *FEW]
    assert cli.main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (folder / "runs.jsonl").read_text() == before
    assert printed["rows"][0]["setting"] == "untouched"
    assert printed["floors"]["most common answer"]["exact"]["asked"] == 9
    assert printed["rows"][1]["seconds"]["rounds"] == 1
    words[words.index("0.25")] = "0.5"
    words[words.index("1")] = "0"
    assert cli.main(words) == 0  # another budget: two runs more, no times
    assert (folder / "runs.jsonl").read_text().startswith(before)
    assert [name for name, _ in runs_of(folder)][6:] == ["crossget 0.5", "tome 0.5"]


def test_a_torn_line_is_made_again(folder: Path, data: Path, tmp_path: Path) -> None:
    lines = (folder / "runs.jsonl").read_text().splitlines()[:4]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines)[:-20])
    words = ["compare", "embedded", str(data), *FEW, "--rounds", "0", "--output-dir", str(tmp_path)]
    with pytest.warns(UserWarning, match="1 of 4 lines are not whole"):
        assert cli.main(words) == 0
    with pytest.warns(UserWarning, match="1 of 6 lines"):
        lines = read_lines(tmp_path / "runs.jsonl")
    found = {line["run"]: line["result"] for line in lines}
    assert found["tome 0.25"]["answers"] == dict(runs_of(folder))["tome 0.25"]["answers"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "5"], "limit was None, not 5"),
        (["--prompt-template", "{} please"], "prompt_template was '{}', not '{} please'"),
        (["--dtype", "bfloat16"], "dtype was 'float32', not 'bfloat16'"),
    ],
)
def test_results_of_other_settings_are_kept(
    folder: Path, data: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    before = (folder / "runs.jsonl").read_text()
    assert cli.main(["compare", "embedded", str(data), *FEW, *words, "--output-dir", str(folder)]) == 2
    assert message in capsys.readouterr().err
    assert (folder / "runs.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["embedded", "gone.json"], "gone.json does not exist"),
        (["./gone", "DATA"], "there is no folder ./gone"),
        (["embedded", "DATA", "--methods", "tome", "nonsense"], "unknown method 'nonsense'"),
        (["embedded", "DATA", "--methods", "tome", "madtp"], "'madtp' is not possible here: it chooses"),
        (["embedded", "DATA", "--methods", "tome", "tome"], "methods has 'tome' twice"),
        (["embedded", "DATA", "--keep-ratios", "0.5", "1"], "keep_ratios has 1, which is the untouched model"),
        (["embedded", "DATA", "--keep-ratios", "2"], "keep_ratios must be in (0, 1]"),
        (["embedded", "DATA", "--image-folder", "gone"], "the image folder gone does not exist"),
        (["embedded", "DATA", "--prompt_template", "x"], "has no {}, where the question goes"),
        (["embedded", "DATA", "--device", "cuda:77"], "the device 'cuda:77' cannot be used"),
        (["embedded", "DATA", "--output_dir", "DATA/out"], "cannot write into the folder"),
        (["embedded", "DATA", "--rounds", "-1"], "rounds must be at least 0"),
    ],
)
def test_mistakes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", *(word.replace("DATA", str(data)) for word in words)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").rglob("runs.jsonl"))


def test_padding_changes_no_count(data: Path) -> None:
    """Tokens are counted on single questions, so a mean over questions has no padding in it."""
    torch.set_num_threads(1)
    options = CompareOptions("embedded", str(data))
    answerer = load_answerer(options)
    questions = read_sample(load_records(data), "data", None, 0, quiet=True).questions
    assert {len(question.messages) for question in questions[:2]} == {1, 3}
    with accelerated(answerer.model, method="uniform", keep_ratio=0.5):
        assert counted_costs(answerer, questions[:2])["visual_tokens"] == 72
