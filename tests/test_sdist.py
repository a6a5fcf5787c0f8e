"""The sdist has all that is tracked, so the tests and the Makefile run from it, too."""

import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_everything_tracked_is_in_the_sdist() -> None:
    targets = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    listed = {entry.removeprefix("/") for entry in targets["sdist"]["include"]}
    assert [entry for entry in listed if not (ROOT / entry).exists()] == []
    if (ROOT / ".git").exists():  # an unpacked sdist is no repository
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert {path.partition("/")[0] for path in tracked.splitlines()} == listed
