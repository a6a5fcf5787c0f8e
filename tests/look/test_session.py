"""The work behind ``mllm-crossget ui``, without a page: answers while they are made, several visitors, mistakes."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm_crossget import cli
from mllm_crossget.embedded import answer, held_out_questions
from mllm_crossget.hooks.ground.state import handle_of
from mllm_crossget.look.drawing import draw_stage
from mllm_crossget.look.session import EMBEDDED, UNTOUCHED, Models, UiOptions, ask, choices, setting_of
from mllm_crossget.look.stages import Stage
from tests.helpers.tiny import tiny_llava


@pytest.fixture(scope="module")
def loaded():
    return Models().get(EMBEDDED)


@pytest.fixture(scope="module")
def asked():
    return next(question for question in held_out_questions(40) if question.kind == "caption")


def test_an_answer_comes_word_by_word(loaded, asked) -> None:
    found = list(ask(loaded, asked.image, asked.text, setting_of("tome", 0.5)))
    texts = [one.text for one in found]
    assert len(set(texts)) > 3
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert [one.finished for one in found] == [False] * (len(found) - 1) + [True]
    last = found[-1]
    assert (last.visual_tokens, last.stages[-1].tokens, last.stages[0].tokens) == (72, 72, 144)
    assert last.seconds > 0
    assert not loaded.lock.locked()
    assert handle_of(loaded.model) is None
    untouched = list(ask(loaded, asked.image, asked.text, setting_of(UNTOUCHED, 0.5)))[-1]
    assert untouched.text == answer(loaded.model, loaded.processor, [asked])[0]
    assert (untouched.visual_tokens, untouched.stages) == (144, ())
    assert untouched.gflops > last.gflops > 0


def test_visitors_do_not_disturb_each_other(loaded, asked) -> None:
    """Each of several visitors at the same time gets what they would get alone."""
    wanted = [("tome", 0.5), (UNTOUCHED, 1.0), ("random-output", 0.1)]
    alone = [list(ask(loaded, asked.image, asked.text, setting_of(*one)))[-1] for one in wanted]
    together: dict[int, object] = {}

    def visit(number: int) -> None:
        together[number] = list(ask(loaded, asked.image, asked.text, setting_of(*wanted[number])))[-1]

    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(len(wanted))]
    for one in visitors:
        one.start()
    for one in visitors:
        one.join(timeout=60)
    for number, expected in enumerate(alone):
        assert together[number].text == expected.text
        assert together[number].stages == expected.stages
        assert together[number].visual_tokens == expected.visual_tokens
    assert len({one.visual_tokens for one in alone}) == 3
    assert handle_of(loaded.model) is None


def test_a_visitor_who_leaves_frees_the_model(loaded, asked) -> None:
    answers = ask(loaded, asked.image, asked.text, setting_of("tome", 0.25), new_tokens=256)
    first = next(answers)
    assert not first.finished
    answers.close()
    limit = time.monotonic() + 30
    while loaded.lock.locked() and time.monotonic() < limit:
        time.sleep(0.01)
    assert not loaded.lock.locked()
    assert handle_of(loaded.model) is None


@pytest.mark.parametrize(
    ("question", "new_tokens", "message"),
    [
        ("  ", 5, "write a question"),
        ("a" * 2001, 5, "2001 characters"),
        ("Why?", 257, "1 to 256"),
        ("Why?", 0, "got 0"),
    ],
)
def test_mistakes_of_a_visitor(loaded, asked, question: str, new_tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(ask(loaded, asked.image, question, None, new_tokens))
    assert not loaded.lock.locked()


def test_an_error_inside_reaches_the_visitor(loaded, asked) -> None:
    with pytest.raises(TypeError, match="NoneType"):
        list(ask(loaded, None, asked.text, setting_of("tome", 0.25)))
    assert not loaded.lock.locked()
    assert handle_of(loaded.model) is None


def test_settings() -> None:
    assert setting_of("tome", 0.25).keep_ratio == 0.25
    assert setting_of("tome", 1.0) is None
    assert "madtp" not in choices()
    for name, keep_ratio in (("nonsense", 0.5), ("madtp", 0.5), ("tome", 0.0), ("tome", float("nan"))):
        with pytest.raises(ValueError, match=r"choose one of|keep_ratio must be in"):
            setting_of(name, keep_ratio)


def test_models_that_visitors_may_choose(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose one of the embedded model, mine; other models are not loaded"):
        Models(["mine"]).get(str(tmp_path))
    with pytest.raises(ValueError, match="cannot be loaded"):
        Models(any_name=True).get(str(tmp_path))
    with pytest.raises(ValueError, match="there is no folder"):
        Models(any_name=True).get("/no/such/folder")
    models = Models()
    assert models.get(" ") is models.get(EMBEDDED)


def test_a_folder_with_a_model(tmp_path: Path, loaded, asked) -> None:
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    models = Models(any_name=True)
    assert models.get(EMBEDDED) is models.get(EMBEDDED)
    own = models.get(str(tmp_path))
    assert own.model is not loaded.model
    same = [list(ask(one, asked.image, asked.text, setting_of("tome", 0.25)))[-1].text for one in (own, loaded)]
    assert same[0] == same[1]


def test_a_processor_without_a_chat_template(asked, loaded) -> None:
    class Bare:
        chat_template = None

    bare = type(loaded)("bare", tiny_llava(), Bare())
    with pytest.raises(ValueError, match="has no chat template"):
        list(ask(bare, asked.image, "Why?", None))


@pytest.mark.parametrize(
    ("host", "private"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("10.0.0.1", False), ("a", False)],
)
def test_who_may_name_a_model(host: str, private: bool) -> None:
    assert UiOptions(host=host).is_private is private


def test_without_gradio_there_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Gradio is hidden, so that the test means the same where it is installed."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "mllm_crossget.look.app", raising=False)
    assert cli.main(["ui"]) == 2
    printed = capsys.readouterr()
    assert printed.err.endswith("pip install 'mllm-crossget[ui]'\n")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_bad_options_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ui", "--port", "0"]) == 2
    assert "port must be from 1 to 65535, got 0" in capsys.readouterr().err


def test_a_stage_is_drawn_over_the_picture() -> None:
    picture = Image.fromarray(np.array([[[200, 0, 0], [100, 0, 0]], [[0, 0, 250], [0, 240, 0]]], dtype=np.uint8))
    drawn = draw_stage(picture, Stage("a", 2, 2, (0, 0, -1, 1)), longest=40)
    assert drawn.size == (40, 40)
    assert drawn.getpixel((5, 5)) == drawn.getpixel((35, 5)) == (150, 0, 0)
    assert drawn.getpixel((5, 35)) == (0, 0, 38)
    assert drawn.getpixel((35, 35)) == (0, 240, 0)
    assert drawn.getpixel((20, 5)) == (150, 0, 0)
    assert drawn.getpixel((20, 30)) == drawn.getpixel((5, 20)) == (255, 255, 255)
