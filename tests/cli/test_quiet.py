"""What a command prints on stderr is its own: no bars, warnings or notes of other packages, and all of ours."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from transformers.utils import logging as theirs

from mllm_crossget.embedded import held_out_questions
from mllm_crossget.files.quiet import quiet
from tests.helpers.versions import TRAINS

ROOT = Path(__file__).parents[2]
OURS = ("answering:", "timing:", "reading pictures:")
ADAPTERS = ["crossget-trained"] if TRAINS else []
COMMANDS = [
    ["inspect", "llava-1.5-7b"],
    ["families"],
    ["show", "photo.png", "--html", "out.html"],
    ["compare", "embedded", "questions.json", "--methods", "tome", "--keep_ratios", "0.25", "--rounds", "1"],
    ["demo", "--limit", "2", "--methods", "crossget", *ADAPTERS, "--keep_ratios", "0.5", "--rounds", "1"],
]
RUN_ALL = "import json, sys; from mllm_crossget.cli import main; sys.exit(max(map(main, json.loads(sys.argv[1]))))"


def test_nothing_of_others_on_the_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = held_out_questions(limit=1)[0]
    asked.image.save(tmp_path / "photo.png")
    turns = [{"from": "human", "value": f"<image>\n{asked.text}"}, {"from": "gpt", "value": asked.answer}]
    (tmp_path / "questions.json").write_text(json.dumps([{"id": "1", "image": "photo.png", "conversations": turns}]))
    for name in ("TRANSFORMERS_VERBOSITY", "PYTHONWARNINGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [sys.executable, "-c", RUN_ALL, json.dumps(COMMANDS)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = [line.strip() for line in done.stderr.replace("\r", "\n").splitlines()]
    assert done.returncode == 0, done.stderr
    assert [line for line in lines if line and not line.startswith(OURS)] == []
    assert any(line.startswith("answering: 100%") for line in lines), "our own bars are there"


def test_ours_is_said_and_all_is_as_before(recwarn: pytest.WarningsRecorder) -> None:
    logger, filters = logging.getLogger("transformers.generation"), list(warnings.filters)
    before = logger.level, theirs.is_progress_bar_enabled(), are_progress_bars_disabled()
    with quiet():
        assert not theirs.is_progress_bar_enabled()
        assert are_progress_bars_disabled() == before[2], "downloads take minutes: their bars stay"
        assert not logging.getLogger("transformers.generation.utils").isEnabledFor(logging.WARNING)
        assert logging.getLogger("transformers.modeling_utils").isEnabledFor(logging.WARNING)
        warnings.warn_explicit("theirs", FutureWarning, "peft/tuners.py", 1, module="peft.tuners")
        warnings.warn_explicit("a mistake", UserWarning, "peft/tuners.py", 2, module="peft.tuners")
        warnings.warn_explicit("ours", FutureWarning, "moved.py", 1, module="someone.script")
    assert [str(one.message) for one in recwarn.list] == ["a mistake", "ours"]
    assert (logger.level, theirs.is_progress_bar_enabled(), are_progress_bars_disabled()) == before
    assert warnings.filters == filters
