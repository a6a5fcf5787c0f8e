"""The stages of a picture's patches, and the page of ``mllm-crossget show --html``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from mllm_crossget import ToMeConfig, cli, trace_merges
from mllm_crossget.api import accelerated
from mllm_crossget.embedded import held_out_questions, load_embedded
from mllm_crossget.look.page import MOST_BYTES, html_of, look_at, settings_of
from mllm_crossget.look.prompts import picture_seen, question_inputs, text_tokens
from mllm_crossget.look.stages import Stage, attention_received, changed_patches, follow
from mllm_crossget.methods import RandomConfig
from mllm_crossget.methods.rivals import CdPrunerConfig, FasterVlmConfig


@pytest.fixture(scope="module")
def embedded():
    return load_embedded()


@pytest.fixture(scope="module")
def asked():
    return held_out_questions(1)[0]


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_the_stages_are_those_of_the_trace(embedded, asked) -> None:
    model, processor = embedded
    inputs = question_inputs(model, processor, asked.image, asked.text)
    method = ToMeConfig(keep_ratio=0.25, schedule="constant")
    with accelerated(model, method), trace_merges(model) as trace:
        model(**inputs)
    followed = follow(model, processor, inputs, method)
    assert followed.answer == asked.answer
    assert [stage.name for stage in followed.stages] == [
        "input",
        *(f"layer {n}" for n in range(1, 8)),
        "language model",
    ]
    for stage, entry in zip(followed.stages[1:], trace, strict=False):
        source = entry.source[0, 1:]
        groups = torch.tensor(stage.groups)
        assert torch.equal(groups[:, None] == groups, source[:, None] == source)
        assert stage.tokens == entry.size.shape[1] - 1
    assert (followed.stages[0].tokens, followed.stages[-1].tokens, followed.tiles) == (144, 36, 1)


@pytest.mark.parametrize("method", [FasterVlmConfig(keep_ratio=0.25), RandomConfig(keep_ratio=0.25, drop=True)])
def test_dropped_patches_are_in_no_group(embedded, asked, method) -> None:
    model, processor = embedded
    last = follow(model, processor, question_inputs(model, processor, asked.image, "?"), method, 1).stages[-1]
    assert last.groups.count(-1) == 144 - 36
    assert sorted(set(last.groups) - {-1}) == list(range(36))


def test_attention_received_is_that_of_the_eager_maps(embedded, asked) -> None:
    model, processor = embedded
    inputs = question_inputs(model, processor, asked.image, asked.text)
    before = model(**inputs).logits
    heard = attention_received(model, lambda: model(**inputs))
    assert torch.equal(model(**inputs).logits, before)
    tower = model.model.vision_tower
    kind = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        maps = tower(inputs["pixel_values"], output_attentions=True).attentions
    finally:
        tower.set_attn_implementation(kind)
    assert len(heard) == 7
    for layer, expected in zip(heard, maps, strict=False):
        torch.testing.assert_close(torch.tensor(layer), expected.mean(dim=(1, 2))[0, 1:], rtol=1e-4, atol=1e-6)


def test_what_the_tower_sees(embedded, asked) -> None:
    model, processor = embedded
    inputs = question_inputs(model, processor, asked.image.resize((200, 200)), asked.text)
    seen = picture_seen(processor, inputs, asked.image)
    again = processor.image_processor(images=[seen], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(again, inputs["pixel_values"], rtol=0, atol=0.02)
    assert text_tokens(model, inputs) == inputs["input_ids"].shape[1] - 144


def test_changed_patches() -> None:
    one = Stage("a", 2, 3, (0, 0, 1, 2, -1, 1))
    same = Stage("b", 2, 3, (5, 5, 7, 9, -1, 7))
    assert changed_patches(one, same) == []
    assert changed_patches(one, Stage("c", 2, 3, (0, 0, 1, 2, 2, -1))) == [2, 3, 4, 5]
    with pytest.raises(ValueError, match="grids of 2 x 3 and 3 x 2"):
        changed_patches(one, Stage("c", 3, 2, (0, 0, 1, 2, 2, -1)))


def test_the_page_says_what_another_question_changes(embedded, asked) -> None:
    model, processor = embedded
    methods = {"tome": ToMeConfig(keep_ratio=0.25), "cdpruner": CdPrunerConfig(keep_ratio=0.25)}
    questions = ["Which digit is red?", "How many digits are there?"]
    look = look_at(model, processor, "A <model>", asked.image, questions, methods)
    page = html_of(look)
    data = data_of(page)
    assert "A <model>" not in page
    assert data["about"].startswith("A <model>. Question: Which digit is red?")
    untouched, tome, cdpruner = data["methods"]
    assert [untouched["name"], tome["runs"][0]["tokens"][-1], untouched["runs"][0]["tokens"][-1]] == [
        "untouched",
        36,
        144,
    ]
    assert "does not see the question" in tome["difference"]
    assert not any(tome["changed"])
    changed = cdpruner["changed"][-1]
    assert f"{len(changed)} of 144 patches" in cdpruner["difference"]
    first, second = (data["grids"][run["stages"][-1]]["groups"] for run in cdpruner["runs"])
    assert {patch for patch in range(144) if (first[patch] < 0) != (second[patch] < 0)} <= set(changed)
    assert changed
    assert untouched["gflops"] > tome["gflops"] > 0
    assert len(data["heat"]) == 7
    assert max(data["heat"][0]["shares"]) == 99


def test_the_page_loads_nothing(embedded, asked) -> None:
    model, processor = embedded
    look = look_at(model, processor, "model", asked.image, ["?"], {"tome": ToMeConfig()}, new_tokens=1)
    page = html_of(look)
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)|url\(|@import|fetch\(|XMLHttpRequest|https?://""", page)
    assert len(page.encode()) < MOST_BYTES


def test_too_large_a_page_is_refused(embedded, asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllm_crossget.look.page.MOST_BYTES", 10_000)
    model, processor = embedded
    look = look_at(model, processor, "model", asked.image, ["?"], {"tome": ToMeConfig()}, new_tokens=1)
    with pytest.raises(ValueError, match="10,000 are allowed"):
        html_of(look)


def test_settings_in_words() -> None:
    assert settings_of(ToMeConfig(keep_ratio=0.25)) == "keep_ratio 0.25"
    assert settings_of(RandomConfig(visual_tokens=20, drop=True)) == "visual_tokens 20, drop True"


def test_show_writes_the_page(tmp_path: Path, asked, capsys: pytest.CaptureFixture[str]) -> None:
    picture, page = tmp_path / "a picture.png", tmp_path / "new" / "look.html"
    asked.image.save(picture)
    words = ["show", str(picture), "--method", "tome", "--methods", "random-drop", "tome", "--html", str(page)]
    assert cli.main([*words, "--question", asked.text, "--keep-ratio", "0.5"]) == 0
    assert f"written to {page}" in capsys.readouterr().out
    data = data_of(page.read_text())
    assert [one["name"] for one in data["methods"]] == ["untouched", "tome", "random-drop"]
    assert [one["runs"][0]["tokens"][-1] for one in data["methods"]] == [144, 72, 72]
    assert data["methods"][0]["answers"] == [asked.answer]
    assert not (tmp_path / "runs").exists()


def test_pictures_may_come_first_and_the_png_stays(tmp_path: Path, asked, capsys: pytest.CaptureFixture[str]) -> None:
    picture, output = tmp_path / "a.png", tmp_path / "b.png"
    asked.image.save(picture)
    assert cli.main(["show", str(picture), "--method", "tome", "--output", str(output)]) == 0
    with Image.open(output) as sheet:
        assert sheet.width > 3 * 96
    assert "image 1: 145" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--question", "Why?"], "question is for a page; give --html page.html too"),
        (["--methods", "tome"], "methods is for a page"),
        (["a.png", "b.png", "--html", "page.html"], "a page shows one image, got 2"),
        (["--html", "page.pdf"], "write it as .html"),
        (["--html", "page.html", "--methods", "nonsense"], "unknown method 'nonsense'"),
        (["--html", "page.html", "--methods", "tome", "--r", "3"], "give --keep_ratio or --visual_tokens, not r"),
        (["--html", "page.html", "--new_tokens", "0"], "new_tokens"),
    ],
)
def test_mistakes_are_told_before_work_begins(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["show", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
