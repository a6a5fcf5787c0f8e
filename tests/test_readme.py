"""The README's figures are those of the result files, and its ten lines are in the API."""

import re
import subprocess
import sys
from pathlib import Path

import mllm_crossget

ROOT = Path(__file__).resolve().parent.parent


def test_tables_are_made_from_the_result_files() -> None:
    script = ROOT / "scripts" / "readme_tables.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"run python scripts/readme_tables.py\n{done.stderr}"


def test_what_the_readme_imports_exists() -> None:
    names = re.findall(r"^from mllm_crossget import (.+)$", (ROOT / "README.md").read_text(), flags=re.M)
    assert names
    for name in ", ".join(names).split(", "):
        assert hasattr(mllm_crossget, name)


def test_pictures_and_files_of_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\((eval/[^)]+)\)", text):
        assert (ROOT / path).is_file(), path
