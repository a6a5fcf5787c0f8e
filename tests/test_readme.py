"""README.md and docs/: figures are those of the result files; links and pictures exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
LINKING = [
    page
    for folder in ("", "docs", "docs/api", "eval", "scripts/configs", ".github")
    for page in sorted((ROOT / folder).glob("*.md"))
]
MOST_LINES = 150


def test_the_readme_is_one_screen() -> None:
    assert len(README.read_text().splitlines()) <= MOST_LINES


def test_tables_are_made_from_the_result_files(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import readme_tables

    monkeypatch.setattr(sys, "argv", ["readme_tables.py", "--check"])
    code = readme_tables.main()
    assert code == 0, f"run python scripts/readme_tables.py\n{capsys.readouterr().out}"


@pytest.mark.parametrize("change", ["| untouched | 145 |", "<!-- table:unknown -->\n<!-- /table:unknown -->"])
def test_the_check_of_the_tables_can_fail(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import readme_tables

    tables = {"demo_short": "| untouched | 144 |"}
    text = "<!-- table:demo_short -->\n| untouched | 144 |\n<!-- /table:demo_short -->\n"
    assert readme_tables.rendered(text, tables) == (text, ["demo_short"])
    if "unknown" in change:
        with pytest.raises(ValueError, match="no table 'unknown'; there are demo_short"):
            readme_tables.rendered(text + change, tables)
    else:
        assert readme_tables.rendered(text.replace("| untouched | 144 |", change), tables)[0] == text


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings that MkDocs and GitHub make alike, and those that the page sets itself."""
    text = without_code(page.read_text())
    found = set(re.findall(r'(?:id|name)="([^"]+)"', text))
    for heading in re.findall(r"^#+ +(.+?) *#*$", text, flags=re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        words = re.sub(r"[^\w\s-]", "", words).strip()
        if (of_github := words.replace(" ", "-")) == re.sub(r"[-\s]+", "-", words):
            found.add(of_github)
    return found


def without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)


def broken_links(page: Path) -> list[str]:
    """Links and pictures of a page whose file, or whose heading in it, is not there."""
    text = re.sub(r"`[^`\n]*`", "", without_code(page.read_text()))
    links = re.findall(r"\]\(([^)\s]+)\)|^\[[^]]+\]: (\S+)|(?:src|href)=\"([^\"]+)\"", text, flags=re.M)
    broken = []
    for link in filter(lambda link: not re.match(r"https://|mailto:", link), ("".join(parts) for parts in links)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.is_file() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_pictures_exist(page: Path) -> None:
    assert not broken_links(page)


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# The *one* `heading`\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[a](other.md#the-one-heading) [b](#here) [c](other.md#no-heading) [d](none.md) [e](#there)\n"
        '![f](none.png) <img src="none.svg"> [g][h] `[i](none)` [j](http://plain.example)\n\n[h]: none.txt\n'
    )
    links = ["other.md#no-heading", "none.md", "#there", "none.png", "none.svg", "http://plain.example", "none.txt"]
    assert broken_links(page) == links


def figures(page: str) -> set[str]:
    """Numbers with a decimal point, outside of code and names of settings."""
    text = re.sub(r"`[^`\n]*`|LLaVA-1\.5(-7B)?|version 0\.1", "", without_code((ROOT / "docs" / page).read_text()))
    return set(re.findall(r"\d+\.\d+", text))


def test_findings_repeat_the_figures_of_the_other_pages() -> None:
    repeated = set().union(*(figures(page) for page in ("accuracy.md", "fine-tuning.md", "budget.md")))
    found = figures("findings.md")
    assert len(found) > 30
    assert found <= repeated, f"no other page has {sorted(found - repeated)}"


def test_every_finding_has_a_command_and_its_files() -> None:
    text = (ROOT / "docs" / "findings.md").read_text()
    for finding in re.split(r"^## ", text, flags=re.M)[1:]:
        title = finding.partition("\n")[0]
        assert re.search(r"^```bash\n(python|mllm-crossget) ", finding, flags=re.M), f"{title}: no command"
        files = re.findall(r"`(eval/[^`]+)`", finding)
        assert files or "No result file" in finding, f"{title}: no result file"
        assert all((ROOT / file).is_file() for file in files), f"{title}: {files}"


def test_every_question_is_answered_with_something_to_run() -> None:
    questions = re.split(r"^## ", (ROOT / "docs" / "faq.md").read_text(), flags=re.M)[1:]
    without = [one.partition("\n")[0] for one in questions if not re.search(r"^```(bash|python)$", one, flags=re.M)]
    assert len(questions) > 15
    assert not without
