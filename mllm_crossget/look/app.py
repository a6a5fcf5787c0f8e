"""``mllm-crossget ui``: the page. What it computes is in ``session``, ``uploads`` and ``drawing``.

The page listens on the loopback address unless told otherwise. It asks nobody else for anything: no fonts, no scripts,
no usage reports.
"""

from __future__ import annotations

import os

# Read by gradio when it is imported: no reports of usage, no look for newer versions.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from mllm_crossget.embedded import Question, held_out_questions
from mllm_crossget.look.drawing import draw_stage
from mllm_crossget.look.session import (
    EMBEDDED,
    MOST_NEW_TOKENS,
    UNTOUCHED,
    Answer,
    Models,
    UiOptions,
    ask,
    choices,
    setting_of,
)
from mllm_crossget.look.uploads import MOST_BYTES, picture_of_upload

_EXAMPLES = 6
_WAITING = 20  # visitors in the queue; more are told to come back
_KEPT_SECONDS = 3600  # of files that visitors have sent
# The page may load what the server itself gives, and nothing else.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; "
    "frame-ancestors 'self'; form-action 'self'"
)
_NAMES = ("First", "Second")
_SMALLEST = 400  # pixels of the longest side of a picture that is shown
_INTRO = """# Fewer visual tokens, side by side
Choose a picture, ask a question, and compare two settings. Patches that became one token are drawn in their mean
colour; dropped patches are dark. The time is that of this machine, for one picture, after a warm-up."""


@dataclass(frozen=True)
class Column:
    """The components of one of the two settings."""

    method: Any
    keep_ratio: Any
    answer: Any
    figures: Any


def run(options: UiOptions) -> None:
    """Serve the page until it is stopped. Raises ``OSError`` if the port is taken."""
    page = build(Models(options.models, any_name=options.is_private))
    page.queue(max_size=_WAITING, default_concurrency_limit=4, api_open=False)
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"open http://{host}:{options.port} in a browser; Ctrl-C stops", flush=True)
    page.launch(
        server_name=options.host,
        server_port=options.port,
        share=False,
        inbrowser=False,
        quiet=True,
        show_error=False,
        max_file_size=MOST_BYTES,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        run_history=False,
        app_kwargs={"middleware": [_own_files_only()]},
    )


def build(models: Models) -> gr.Blocks:
    """The page, for these models."""
    questions = _example_questions()
    with gr.Blocks(title="mllm_crossget", analytics_enabled=False, delete_cache=(_KEPT_SECONDS, _KEPT_SECONDS)) as page:
        gr.Markdown(_INTRO)
        model = _model_choice(models)
        with gr.Row():
            with gr.Column():
                upload = gr.File(
                    label="Your picture", file_types=["image"], type="filepath", height=120, elem_id="upload"
                )
                examples = gr.Gallery(
                    [(one.image, one.text) for one in questions], label="Examples", columns=3, height=260,
                    allow_preview=False, buttons=[], elem_id="examples",
                )  # fmt: skip
            with gr.Column():
                shown = gr.Image(
                    _enlarged(questions[0].image), label="The picture", interactive=False, height=300, buttons=[],
                    elem_id="shown",
                )  # fmt: skip
                note = gr.Markdown("", elem_id="note")
        question = gr.Textbox(questions[0].text, label="Question", max_length=2000, elem_id="question")
        with gr.Row():
            new_tokens = gr.Slider(1, MOST_NEW_TOKENS, 64, step=1, label="Most tokens of the answer")
            button = gr.Button("Ask", variant="primary", elem_id="ask")
        with gr.Row():
            columns = [_column(0, UNTOUCHED, 1.0), _column(1, "crossget", 0.25)]
        layer = gr.Slider(0, 1, 1, step=1, label="Layer", elem_id="layer", interactive=False)
        place = gr.Markdown("", elem_id="place")
        with gr.Row():
            drawn = [_tokens_picture(number) for number in (0, 1)]
        picture, answers = gr.State(questions[0].image), gr.State([Answer(), Answer()])

        upload.upload(_take_upload, upload, [picture, shown, note], api_visibility="private")
        examples.select(_example_taker(questions), None, [picture, shown, note, question], api_visibility="private")
        given = [
            model,
            picture,
            question,
            new_tokens,
            *(part for one in columns for part in (one.method, one.keep_ratio)),
        ]
        words = [part for one in columns for part in (one.answer, one.figures)]
        results = [note, answers, layer, place, *words, *drawn]
        for event in (button.click, question.submit):
            event(
                _asker(models), given, results, api_visibility="private", concurrency_limit=1, concurrency_id="model",
                show_progress="minimal", trigger_mode="once",
            )  # fmt: skip
        layer.change(
            _draw_layer, [layer, answers], [place, *drawn], api_visibility="private",
            show_progress="hidden", trigger_mode="always_last",
        )  # fmt: skip
    return page


def _example_questions() -> list[Question]:
    """Questions about different scenes."""
    by_scene: dict[int, Question] = {}
    for number, question in enumerate(held_out_questions(60)):
        by_scene.setdefault(question.scene_index, question)
        if number % 3 == 2:  # not the same kind of question everywhere
            by_scene[question.scene_index] = question
    return list(by_scene.values())[:_EXAMPLES]


def _model_choice(models: Models) -> Any:
    label = "Model: one of the list, a folder, or a repository of the hub" if models.any_name else "Model"
    return gr.Dropdown(models.names, value=EMBEDDED, label=label, allow_custom_value=models.any_name, elem_id="model")


def _column(number: int, method: str, keep_ratio: float) -> Column:
    name = _NAMES[number]
    with gr.Column(min_width=280):
        chosen = gr.Dropdown(choices(), value=method, label=f"{name} setting", elem_id=f"method-{number}")
        ratio = gr.Slider(
            0.02, 1.0, keep_ratio, step=0.01, label=f"{name} keep ratio: share of the visual tokens that is left",
            elem_id=f"keep-{number}",
        )  # fmt: skip
        answer = gr.Textbox(label=f"{name} answer", interactive=False, elem_id=f"answer-{number}")
        figures = gr.Markdown("", elem_id=f"figures-{number}")
    return Column(chosen, ratio, answer, figures)


def _tokens_picture(number: int) -> Any:
    return gr.Image(
        label=f"{_NAMES[number]} tokens",
        interactive=False,
        format="png",
        buttons=["download", "fullscreen"],
        min_width=280,
        elem_id=f"tokens-{number}",
    )


def _take_upload(path: str | None) -> tuple[Any, Any, str]:
    if path is None:
        return gr.skip(), gr.skip(), ""
    try:
        taken = picture_of_upload(path)
    except ValueError as error:
        return gr.skip(), gr.skip(), str(error)
    return taken.picture, _enlarged(taken.picture), taken.note


def _example_taker(questions: list[Question]) -> Any:
    def take(event: gr.SelectData) -> tuple[Any, Any, str, str]:
        chosen = questions[int(event.index) % len(questions)]
        return chosen.image, _enlarged(chosen.image), "", chosen.text

    return take


def _asker(models: Models) -> Any:
    def answer_both(
        model: str,
        picture: Image.Image,
        question: str,
        new_tokens: float,
        first: str,
        first_ratio: float,
        second: str,
        second_ratio: float,
    ) -> Iterator[list[Any]]:
        answers = [Answer(), Answer()]
        yield _shown("Loading the model …", answers)
        try:
            settings = [setting_of(first, first_ratio), setting_of(second, second_ratio)]
            loaded = models.get(model)
            for number, setting in enumerate(settings):
                for found in ask(loaded, picture, question, setting, int(new_tokens)):
                    # pictures are drawn when both answers are there: encoding them takes longer than a word
                    answers[number] = found
                    yield _shown(f"{_NAMES[number]} setting …", answers)
            yield _shown("", answers, drawn=True)
        except (ValueError, TypeError, LookupError, OSError, RuntimeError) as error:
            yield _shown(_sentence(error), answers)

    return answer_both


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"This did not work: {text[:600]}"


def _shown(note: str, answers: list[Answer], drawn: bool = False) -> list[Any]:
    """New values of the note, the answers, the layer, its name, and what the two columns show."""
    words = [part for one in answers for part in (one.text, _figures(one))]
    if not drawn:
        return [note, gr.skip(), gr.skip(), gr.skip(), *words, gr.skip(), gr.skip()]
    stages = max((one.stages for one in answers), key=len)
    last = max(0, len(stages) - 1)
    layer = gr.Slider(maximum=max(1, last), value=last, interactive=last > 0)
    place, *pictures = _draw_layer(last, answers)
    return [note, answers, layer, place, *words, *pictures]


def _figures(answer: Answer) -> str:
    parts = []
    if answer.visual_tokens is not None:
        parts.append(f"**{answer.visual_tokens}** visual tokens in the language model")
    if answer.seconds is not None:
        parts.append(f"**{answer.seconds:.2f} s** to the first token")
    if answer.gflops is not None:
        parts.append(f"**{answer.gflops:.2f}** GFLOPs for picture and prompt")
    return ", ".join(parts)


def _drawn(answer: Answer, layer: int) -> Image.Image | None:
    if answer.picture is None:
        return None
    if not answer.stages:
        return _enlarged(answer.picture)
    return draw_stage(answer.picture, answer.stages[min(layer, len(answer.stages) - 1)])


def _draw_layer(layer: float, answers: list[Answer]) -> tuple[str, Any, Any]:
    stages = max((one.stages for one in answers), key=len)
    if not stages:
        return "", _drawn(answers[0], 0), _drawn(answers[1], 0)
    chosen = min(max(int(layer), 0), len(stages) - 1)
    tokens = " and ".join(str(one.stages[min(chosen, len(one.stages) - 1)].tokens) for one in answers if one.stages)
    return f"{stages[chosen].name}: {tokens} tokens", _drawn(answers[0], chosen), _drawn(answers[1], chosen)


def _enlarged(picture: Image.Image) -> Image.Image:
    """A small picture with whole multiples of its pixels, as it would be shown tiny."""
    times = max(1, _SMALLEST // max(picture.size))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def _own_files_only() -> Any:
    """A middleware that tells browsers to load nothing from other machines."""
    from starlette.middleware import Middleware

    class OwnFiles:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def with_policy(message: Any) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [
                        *message.get("headers", []),
                        (b"content-security-policy", _POLICY.encode()),
                        (b"referrer-policy", b"no-referrer"),
                    ]
                await send(message)

            await self.app(scope, receive, with_policy if scope["type"] == "http" else send)

    return Middleware(OwnFiles)
