"""The unmodified command line of lmms-eval, offline, in a cache folder of its own; skipped where it is missing."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from mllm_crossget.integrations.lmms_eval import tasks_dir
from tests.helpers.evaluation import ROOT, child_environment

TIMEOUT = 900  # seconds of one process; 15 to 60 on an idle machine
MODEL = "llava_hf_crossget"


@dataclass
class LmmsEval:
    """Calls ``python -m lmms_eval``, one process for a list of runs."""

    home: Path

    def entry(self, output: Path, model_args: str, **settings) -> dict:
        base = {"model": MODEL, "include_path": str(tasks_dir()), "log_samples": True, "verbosity": "DEBUG"}
        return {**base, "model_args": model_args, "output_path": str(output), "device": "cpu", **settings}

    def __call__(self, entries: list[dict], folder: Path, processes: int = 1, check: bool = True):
        config = folder / "runs.yaml"
        config.write_text(yaml.safe_dump(entries))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        words = ["-m", "lmms_eval", "--config", str(config)]
        command = [sys.executable, *(launcher if processes > 1 else []), *words]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=child_environment(self.home),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done


@pytest.fixture(scope="session")
def lmms_eval(tmp_path_factory) -> LmmsEval:
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install 'mllm-crossget[eval]'")
    return LmmsEval(tmp_path_factory.mktemp("hf_home"))
