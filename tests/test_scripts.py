"""The scripts beside the package tell their options, and keep the results of an experiment in one file."""

import ast
import importlib
import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("eval/*.py"), *ROOT.glob("scripts/*.py")])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_texts_can_be_filled_in(path):
    """argparse fills help texts in, so a bare percent sign breaks it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Dict):
            continue
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "help" and isinstance(value, ast.Constant):
                assert isinstance(value.value % {}, str), f"{path.name}: {value.value!r}"


@pytest.fixture
def result_files(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "eval"))
    import result_files

    return result_files


def test_runs_come_back_from_the_one_file(result_files, tmp_path):
    assert result_files.read_runs(tmp_path) == {}
    result_files.add_run(tmp_path, "b", {"right": "0101", "loss": 0.1})
    (tmp_path / "a.json").write_text(json.dumps({"right": "0111"}, indent=1))
    (tmp_path / "b.json").write_text(json.dumps({"right": "1111"}))
    (tmp_path / "summary.json").write_text("[]")
    assert result_files.pack(tmp_path) == ["a", "b"]
    assert result_files.read_runs(tmp_path) == {"a": {"right": "0111"}, "b": {"right": "1111"}}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs.jsonl", "summary.json"]


@pytest.mark.parametrize(("line", "words"), [('{"run": "a", "res', "line 2"), ('{"run": "a", "result": {}}', "second")])
def test_a_damaged_file_says_which_line(result_files, tmp_path, line, words):
    result_files.add_run(tmp_path, "a", {})
    with (tmp_path / result_files.FILE).open("a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=words):
        result_files.read_runs(tmp_path)


def test_checks_of_a_gpu_run_dry(capfd, monkeypatch) -> None:
    for name in ("MLLM_CROSSGET_FUSED_MATCHING", "MLLM_CROSSGET_FUSED_IMPORTANCE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr("sys.argv", ["gpu_checks.py", "--dry"])
    checks = importlib.import_module("gpu_checks")
    assert checks.main() == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    assert {line["check"] for line in lines} == {
        "kernels_match",
        "kernels_weigh",
        "bias_channel_equals_mask",
        "compiled_tower",
        "captured_tower",
    }
    monkeypatch.setattr(checks, "_SAME_MERGES", 1.1)  # a check that fails is told by the exit status
    assert checks.main() == 1


def test_the_day_of_a_gpu_is_a_script() -> None:
    assert subprocess.run(["bash", "-n", ROOT / "scripts" / "gpu_day.sh"], check=False).returncode == 0
