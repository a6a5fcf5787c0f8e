"""One HTML file that shows what several methods make of a picture. It holds all that it needs: nothing is loaded."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from mllm_crossget.config import DIALS
from mllm_crossget.costs.flops import model_flops
from mllm_crossget.look.prompts import picture_seen, question_inputs, text_tokens
from mllm_crossget.look.stages import Followed, Stage, answer_of, attention_received, changed_patches, follow
from mllm_crossget.methods.method import Method

MOST_BYTES = 2_000_000
_TEMPLATE = Path(__file__).with_name("page.html")
_LONGEST_SIDE = 672  # pixels of the embedded picture
_HEAT_STEPS = 99
_HEAT_TEXT = (
    "The attention that a patch receives in a layer of the untouched model is the mean over heads and queries. "
    "CrossGET's importance starts from it. It does not depend on the question or the method."
)
_NO_HEAT = "The attention of this model's vision tower cannot be recorded, so there is no map of it."


@dataclass(frozen=True)
class Compared:
    """What one method made of a picture.

    Attributes:
        name: shown above its picture.
        method: the settings; None for the untouched model.
        runs: one per question, in the order of the questions.
        gflops: of the prompt with the picture, by formula; None where there is no formula.
    """

    name: str
    method: Method | None
    runs: tuple[Followed, ...]
    gflops: float | None


@dataclass(frozen=True)
class Look:
    """All that the page shows.

    Attributes:
        model_name: of the model, in words.
        picture: as the vision tower sees it.
        questions: one, or two whose results are compared.
        compared: the untouched model first.
        attention: of ``attention_received``.
        failed: why methods were left out, one sentence each.
    """

    model_name: str
    picture: Image.Image
    questions: tuple[str, ...]
    compared: tuple[Compared, ...]
    attention: list[tuple[float, ...]] | None
    failed: tuple[str, ...] = ()


def look_at(
    model: Any,
    processor: Any,
    model_name: str,
    picture: Image.Image,
    questions: Sequence[str],
    methods: Mapping[str, Method],
    optional: Sequence[str] = (),
    prepare: Callable[[Any, Method], Any] | None = None,
    new_tokens: int = 32,
) -> Look:
    """Ask a model with every method, and record what becomes of the picture's patches.

    Args:
        model: the untouched model.
        processor: its processor.
        model_name: what to call it.
        picture: an RGB picture.
        questions: one or two.
        methods: settings by the name that the page shows.
        optional: names among them that are left out, with the reason, if the model does not take them.
        prepare: called with the accelerated model and its settings before it answers (``calibrate``).
        new_tokens: most tokens of an answer.

    Raises:
        ValueError: a model or a setting that does not fit; patches in no known grid.
    """
    inputs = [question_inputs(model, processor, picture, question) for question in questions]
    heat = attention_received(model, lambda: model(**inputs[0]))
    compared, failed = [], []
    for name, method in tqdm(methods.items(), desc="asking", disable=len(methods) < 2):
        before = None if prepare is None else (lambda one, method=method: prepare(one, method))
        try:
            runs = tuple(follow(model, processor, one, method, new_tokens, before) for one in inputs)
        except ValueError as error:
            if name not in optional:
                raise
            failed.append(f"{name}: {error}")
            continue
        compared.append(Compared(name, runs[0].method, runs, gflops_of(model, inputs[0], runs[0].method)))
    if not compared:
        raise ValueError(f"no method is left to show: {'; '.join(failed)}")
    answers = [answer_of(model, processor, one, new_tokens) for one in inputs]
    untouched = _untouched(compared[0].runs[0], answers)
    same = type(compared[0].runs[0].method)(keep_ratio=1.0)
    first = Compared("untouched", None, untouched, gflops_of(model, inputs[0], same))
    seen = picture_seen(processor, inputs[0], picture)
    return Look(model_name, seen, tuple(questions), (first, *compared), heat, tuple(failed))


def gflops_of(model: Any, inputs: Any, method: Method) -> float | None:
    """GFLOPs of vision tower, projector and prompt for one picture, by formula; None where there is no formula."""
    try:
        return model_flops(model.config, method, text_tokens=text_tokens(model, inputs)).total / 1e9
    except ValueError:
        return None


def settings_of(method: Method) -> str:
    """The settings of a method that differ from its defaults, and its budget, in words."""
    fields = [field for field in dataclasses.fields(method) if getattr(method, field.name) is not None]
    default = {field.name: field.default for field in fields}
    chosen = {field.name: getattr(method, field.name) for field in fields}
    return ", ".join(
        f"{name} {value}"
        for name, value in chosen.items()
        if not isinstance(value, (list, tuple)) and (name in DIALS or value != default[name])
    )


def html_of(look: Look) -> str:
    """The page.

    Raises:
        ValueError: it would be larger than ``MOST_BYTES``.
    """
    text = json.dumps(_data(look), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    page = _TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", text.replace("<", "\\u003c"))
    size = len(page.encode())
    if size > MOST_BYTES:
        raise ValueError(f"the page would have {size:,} bytes, {MOST_BYTES:,} are allowed; name fewer methods")
    return page


def _untouched(like: Followed, answers: Sequence[str]) -> tuple[Followed, ...]:
    stages = tuple(dataclasses.replace(stage, groups=tuple(range(len(stage.groups)))) for stage in like.stages)
    return tuple(dataclasses.replace(like, answer=answer, stages=stages) for answer in answers)


def _data(look: Look) -> dict[str, Any]:
    grids: dict[Stage, int] = {}
    methods = [_of_method(one, look.questions, grids) for one in look.compared]
    first = look.compared[0].runs[0]
    tiles = f" The processor makes {first.tiles} images of it; the first is shown." if first.tiles > 1 else ""
    return {
        "about": f"{look.model_name}. Question: {look.questions[0]}{tiles}",
        "picture": _as_uri(look.picture),
        "questions": list(look.questions),
        "layers": [stage.name for stage in first.stages],
        "heat": [_heat(layer) for layer in look.attention or []],
        "heat_text": _NO_HEAT if look.attention is None else _HEAT_TEXT,
        "methods": methods,
        "grids": [{"rows": one.rows, "columns": one.columns, "groups": one.groups} for one in grids],
        "failed": list(look.failed),
    }


def _of_method(compared: Compared, questions: Sequence[str], grids: dict[Stage, int]) -> dict[str, Any]:
    first = compared.runs[0]
    changed: list[list[int]] = [[] for _ in first.stages]
    if len(questions) > 1:
        pairs = zip(first.stages, compared.runs[1].stages, strict=True)
        changed = [changed_patches(one, other) for one, other in pairs]
    return {
        "name": compared.name,
        "settings": "" if compared.method is None else settings_of(compared.method),
        "answers": [run.answer for run in compared.runs],
        "runs": [
            {
                # equal grids are written once; the name is not part of what is drawn
                "stages": [grids.setdefault(dataclasses.replace(stage, name=""), len(grids)) for stage in run.stages],
                "tokens": [stage.tokens for stage in run.stages],
            }
            for run in compared.runs
        ],
        "changed": changed,
        "difference": _difference(compared, len(changed[-1]), len(first.stages[-1].groups)),
        "gflops": compared.gflops,
    }


def _difference(compared: Compared, changed: int, patches: int) -> str:
    """What another question changes, as a sentence."""
    answers = {run.answer for run in compared.runs}
    answer = "the answer is the same" if len(answers) == 1 else "the answer is another one"
    if compared.method is None:
        return f"untouched: all {patches} visual tokens stay for every question; {answer}."
    if not compared.method.sees_question:
        return (
            f"{compared.name}: with these settings it does not see the question. The groups are the same for every "
            f"question; {answer}."
        )
    return (
        f"{compared.name}: it sees the question. {changed} of {patches} patches are dropped or together with others "
        f"than before; {answer}."
    )


def _heat(layer: Sequence[float]) -> dict[str, Any]:
    most = max(layer)
    return {"most": round(most, 6), "shares": [round(_HEAT_STEPS * value / most) for value in layer]}


def _as_uri(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    lossless = max(small.size) <= 128  # a small picture shows every artefact, and is small anyway
    small.save(file, **({"format": "PNG"} if lossless else {"format": "JPEG", "quality": 88}))
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
