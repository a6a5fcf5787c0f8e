"""The page of ``mllm-crossget ui`` in a headless browser. Left out where gradio, playwright or Chromium is missing."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from mllm_crossget import ToMeConfig
from mllm_crossget.embedded import held_out_questions, load_embedded
from mllm_crossget.look.page import html_of, look_at
from mllm_crossget.methods.rivals import CdPrunerConfig

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None] + ([] if CHROMIUM else ["chromium"])
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
    pytest.mark.any_transformers,
]
SECONDS = 90


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("ui")
    settings = {"GRADIO_TEMP_DIR": str(folder / "uploads"), "MLLM_CROSSGET_FUSED_MATCHING": "0", "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mllm_crossget", "ui", "--port", str(port)],
            stdout=log,
            stderr=log,
            env={**os.environ, **settings},
        )
    try:
        limit = time.monotonic() + SECONDS
        while not _listens(port):
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < limit, "the server does not listen"
            time.sleep(0.2)
        with socket.socket() as other:  # no address but the loopback one
            other.settimeout(2)
            assert other.connect_ex(("127.0.0.2", port)) != 0
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)
    # A browser that goes on to the next page breaks downloads off, and uvicorn reports that in its log.
    log = (folder / "log").read_text()
    assert not re.search(r'File ".*mllm_crossget', log), log


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, address: str) -> Iterator:
    """The page; afterwards: nothing was asked from another machine, and no script failed."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(SECONDS * 1000)
    asked, failed = set(), []
    opened.on("request", lambda request: asked.add(request.url))
    opened.on("pageerror", lambda error: failed.append(str(error)))
    opened.goto(address)
    opened.wait_for_selector("#ask")
    yield opened
    context.close()
    hosts = {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {address.removeprefix("http://")}
    assert failed == []


def shown_until(page, selector: str, pattern: str) -> str:
    """The text of an element as soon as it has the pattern."""
    limit = time.monotonic() + SECONDS
    while not re.search(pattern, text := page.locator(selector).inner_text()):
        assert time.monotonic() < limit, f"{selector} shows {text!r}, expected {pattern}"
        time.sleep(0.1)
    return text


def test_upload_ask_slide_compare_download(page, tmp_path: Path) -> None:
    question = held_out_questions(1)[0]
    question.image.save(tmp_path / "scene.png")
    page.set_input_files("#upload input[type=file]", str(tmp_path / "scene.png"))
    page.locator("#upload").get_by_text("scene").wait_for()
    page.fill("#question textarea", question.text)
    page.fill("#keep-1 input[type=number]", "0.5")
    page.locator("#keep-1 input[type=number]").press("Tab")
    page.click("#ask")
    page.wait_for_selector("#tokens-1 img")
    assert page.input_value("#answer-0 textarea") == page.input_value("#answer-1 textarea") == question.answer
    assert "144 visual tokens" in page.inner_text("#figures-0")
    assert re.search(r"72 visual tokens.*s to the first token.*GFLOPs", page.inner_text("#figures-1"))
    assert shown_until(page, "#place", "tokens") == "language model: 72 tokens"
    page.fill("#layer input[type=number]", "0")
    page.locator("#layer input[type=number]").press("Tab")
    assert shown_until(page, "#place", "input") == "input: 144 tokens"
    with page.expect_download() as waiting:
        page.locator("#tokens-1").get_by_label("Download").first.click()
    with Image.open(waiting.value.path()) as drawn:
        assert drawn.size == (576, 576)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"\x89PNG\r\n\x1a\n" + bytes(200), "no picture|damaged"), (b"GIF89a", "no picture|damaged")],
)
def test_hostile_uploads_get_a_sentence(page, tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "hostile.png").write_bytes(content)
    page.set_input_files("#upload input[type=file]", str(tmp_path / "hostile.png"))
    shown_until(page, "#note", sentence)


def test_two_visitors_at_the_same_time(browser, address: str) -> None:
    """Each gets the tokens of the setting that was asked for, although both ask at once."""
    contexts = [browser.new_context() for _ in range(2)]
    pages = [context.new_page() for context in contexts]
    for page, ratio in zip(pages, ("0.5", "0.25"), strict=True):
        page.goto(address)
        page.fill("#keep-1 input[type=number]", ratio)
        page.locator("#keep-1 input[type=number]").press("Tab")
    for page in pages:
        page.click("#ask")
    for page, tokens in zip(pages, (72, 36), strict=True):
        shown_until(page, "#place", f"language model: {tokens} tokens")
        assert f"{tokens} visual tokens" in page.inner_text("#figures-1")
        assert "144 visual tokens" in page.inner_text("#figures-0")
    for context in contexts:
        context.close()


def test_files_of_the_machine_are_not_given_out(page, address: str) -> None:
    for path in (__file__, "/etc/hostname"):
        answer = page.request.get(f"{address}/gradio_api/file={path}")
        assert answer.status in (403, 404)
    own = page.request.get(address)
    assert "default-src 'self'" in own.headers["content-security-policy"]


def test_mistakes_and_examples(page) -> None:
    page.fill("#question textarea", " ")
    page.click("#ask")
    shown_until(page, "#note", "write a question about the picture")
    page.locator("#examples button img").nth(2).click()
    limit = time.monotonic() + SECONDS
    while page.input_value("#question textarea").strip() == "" and time.monotonic() < limit:
        time.sleep(0.1)
    assert page.input_value("#question textarea").endswith(("?", "."))
    page.fill("#model input", "/no/such/folder")
    page.locator("#model input").press("Enter")
    page.click("#ask")
    shown_until(page, "#note", "there is no folder /no/such/folder")


def test_a_phone_needs_no_sideways_scrolling(page) -> None:
    page.set_viewport_size({"width": 375, "height": 812})
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_the_page_of_show(browser, tmp_path: Path) -> None:
    """Slider, pointer, keyboard and questions of the file that ``mllm-crossget show --html`` writes."""
    question = held_out_questions(1)[0]
    methods = {"tome": ToMeConfig(keep_ratio=0.25), "cdpruner": CdPrunerConfig(keep_ratio=0.25)}
    look = look_at(*load_embedded(), "model", question.image, ["Which digit is red?", question.text], methods)
    (tmp_path / "look.html").write_text(html_of(look))
    context = browser.new_context(viewport={"width": 375, "height": 812}, color_scheme="dark")
    page = context.new_page()
    asked, failed = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto((tmp_path / "look.html").as_uri())
    page.wait_for_selector("body[data-ready]")
    card = page.locator("figure").nth(1)
    assert "36 tokens here" in card.inner_text()
    page.focus("#layer")
    page.keyboard.press("Home")
    assert page.inner_text("#where") == "input"
    assert "144 tokens here" in card.inner_text()
    page.keyboard.press("End")
    card.locator("canvas").focus()
    assert re.search(r"a token of \d+ patch", page.inner_text("#spoken"))
    size = {group: look.compared[1].runs[0].stages[-1].groups.count(group) for group in range(36)}
    page.keyboard.press("ArrowDown")  # from the middle, row 6 and column 6
    group = look.compared[1].runs[0].stages[-1].groups[7 * 12 + 6]
    assert f"a token of {size[group]} patch" in card.inner_text()
    before = card.locator("canvas").evaluate("canvas => canvas.toDataURL()")
    page.check("input[value=heat]")
    assert card.locator("canvas").evaluate("canvas => canvas.toDataURL()") != before
    page.locator("#questions input").nth(2).check()
    assert "does not see the question" in page.inner_text("#difference")
    assert page.locator("figure").nth(0).locator(".answer").inner_text() == question.answer
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 23, 26)"
    context.close()
    assert [url for url in asked if not url.startswith("data:")] == [(tmp_path / "look.html").as_uri()]
    assert failed == []
