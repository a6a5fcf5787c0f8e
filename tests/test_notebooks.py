"""The notebooks of docs/ run from the first cell to the last, and lie in git without what they printed."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
EXPECTED = {
    "quick_start": ["Right is: 6\n", "6\n6\n", "{'before': 144, 'after': 36} 60% of the FLOPs"],
    "compare_methods": ["questions about", "random-drop 0.25", "minus crossget"],
}
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@notebooks
def test_nothing_printed_is_stored(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert cells
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


@notebooks
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    said = "".join(output.get("text", "") + str(output.get("data", "")) for output in outputs)
    assert "Loading weights" not in said
    assert [words for words in EXPECTED[path.stem] if words not in said] == []
    assert said.count("image/png") >= 2


def test_both_notebooks_are_there() -> None:
    assert {path.stem for path in NOTEBOOKS} == EXPECTED.keys()
