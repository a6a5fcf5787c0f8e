"""The recipe of ``eval/easy_vqa.py`` on a data set of six drawn pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from mllm_crossget.embedded import load_embedded
from mllm_crossget.embedded.architecture import build_model, build_processor, vocabulary
from mllm_crossget.embedded.own_pictures import adopt_weights
from mllm_crossget.embedded.pretraining import IGNORE
from mllm_crossget.embedded.questions import WORDS

COLORS = {"blue": (0, 0, 255), "red": (255, 0, 0)}
QUESTIONS = [
    ("is there a {color} shape?", "yes"),
    ("what shape is present?", "{shape}"),
    ("what color is the {shape}?", "{color}"),
    ("is no {shape} present?", "no"),
    ("is there not a teal shape?", "yes"),
]


@pytest.fixture
def modules(monkeypatch):
    for folder in ("eval", "scripts"):
        monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / folder))
    import easy_vqa
    import easy_vqa_data
    import easy_vqa_table
    import easy_vqa_training
    import paired

    return easy_vqa, easy_vqa_data, easy_vqa_table, easy_vqa_training, paired


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "test"):
        images = tmp_path / "data" / split / "images"
        images.mkdir(parents=True)
        asked = []
        for number, (shape, color) in enumerate([("circle", "blue"), ("rectangle", "red"), ("rectangle", "blue")]):
            image = Image.new("RGB", (64, 64), (240, 236, 245))
            draw = getattr(ImageDraw.Draw(image), "ellipse" if shape == "circle" else "rectangle")
            draw((10 + number, 20, 40, 44), fill=COLORS[color])
            image.save(images / f"{number}.png")
            asked += [[part.format(shape=shape, color=color) for part in pair] + [number] for pair in QUESTIONS]
        (images.parent / "questions.json").write_text(json.dumps(asked))
    return tmp_path / "data"


def test_the_first_question_of_either_kind_is_asked(modules, folder):
    data = modules[1]
    asked = data.asked_questions(data.read_split("test", folder))
    assert [(one.kind, one.answer) for one in asked] == [
        *[("yes/no", "yes"), ("shape", "circle")],
        *[("yes/no", "yes"), ("shape", "rectangle")] * 2,
    ]
    assert [one.image.getpixel((25, 30)) for one in asked[::2]] == [COLORS[color] for color in ("blue", "red", "blue")]
    with pytest.raises(ValueError, match="validation"):
        data.read_split("validation", folder)
    (folder / "test" / "images" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1 pictures are missing.*1\.png"):
        data.read_split("test", folder)


@pytest.mark.parametrize(
    ("pairs", "shape"),
    [
        ([("what shape is present?", "circle")], "circle"),
        ([("is there a circle?", "no")], None),
        ([("is there not a circle?", "no")], "circle"),
        ([("does the image not contain a circle?", "yes")], None),
        ([("is no triangle present?", "no"), ("what is the red shape?", "triangle")], "triangle"),
        ([("what color is the triangle?", "red")], "triangle"),
    ],
)
def test_what_questions_say_about_a_picture(modules, pairs, shape):
    data = modules[1]
    assert data.stated(pairs, data.GROUPS["shape"]) == shape


def test_questions_that_contradict_one_another_are_an_error(modules):
    data = modules[1]
    with pytest.raises(ValueError, match="contradict"):
        data.stated([("is there a circle?", "yes"), ("is there a triangle?", "yes")], data.GROUPS["shape"])


def test_patches_are_labelled_by_what_covers_them(modules, folder):
    data = modules[1]
    split = data.read_split("train", folder)
    labelled = data.label_split(split, build_processor(data.word_list(split)).image_processor)
    shape, shown = labelled.patch_labels(torch.arange(3))["shape"]
    assert shown.tolist() == [0, 1, 1]
    grid = shape.view(3, 12, 12)
    # The second picture's rectangle covers pixels 16.5 to 61.5 across and 30 to 67.5 down, of 96.
    assert (grid[1, 4:8, 3:7] == 1).all()
    assert (grid[1, :3] == 3).all()
    assert (grid[1, 4:8, 2] == 1).all()  # covered to more than a quarter
    assert set(grid.unique().tolist()) <= {IGNORE, 0, 1, 3}


def test_a_word_list_makes_model_and_tokenizer():
    words = ("shape", "red", "?", "is")
    assert vocabulary(words)[5:] == ("user", "assistant", ":", "shape", "red", "?", "is")
    with pytest.raises(ValueError, match="'Shape'"):
        vocabulary(("Shape",))
    model, donor = build_model(0, words), load_embedded()[0]
    own = model.get_input_embeddings().weight.clone()
    adopt_weights(model, donor, words)
    mine, known = vocabulary(words), vocabulary(WORDS)
    rows = model.get_input_embeddings().weight
    assert torch.equal(rows[mine.index("red")], donor.get_input_embeddings().weight[known.index("red")])
    assert torch.equal(rows[mine.index("shape")], own[mine.index("shape")])
    one, other = (each.model.vision_tower.state_dict() for each in (model, donor))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_training_steps_and_export(modules, folder, tmp_path):
    training = modules[3]
    options = training.Options(
        *(1, 2, 2, 2), data_folder=str(folder), run_folder=str(tmp_path / "run"), weights_folder=str(tmp_path / "model")
    )
    run, lesson, words = training.prepare(options)
    before = run.model.get_input_embeddings().weight.clone()
    labels, joint = (run.take_step(lesson.loss) for _ in range(2))
    assert "answer" not in labels
    assert 0 < joint["answer"] < joint["loss"]
    assert not torch.equal(run.model.get_input_embeddings().weight, before)
    run.save()
    resumed, lesson, _ = training.prepare(options)
    assert resumed.step == 2
    assert list(resumed.train(lesson.loss)) == [3]
    record = training.export(resumed, words, options)
    assert record["overall"]["asked"] == 6
    assert load_embedded(folder=tmp_path / "model")[1].tokenizer("what shape?").input_ids[-1] == words.index("?") + 8


def test_blind_answers_are_counted_on_the_training_split(modules, folder):
    recipe, data = modules[:2]
    train, questions = data.read_split("train", folder), data.asked_questions(data.read_split("test", folder))
    marks = recipe.blind_marks(train, questions)
    assert marks["most common answer"] == "101010"
    assert marks["most common answer to the question's words"] == "101111"


def run_of(right: str, tokens: int) -> dict:
    score = {"kinds": {"shape": {"accuracy": right.count("1") / len(right), "asked": len(right)}}}
    return {"right": right, "visual_tokens": tokens, "gflops": tokens / 100, "score": score}


def test_the_table_has_differences_to_the_default(modules):
    recipe, _, table, _, _ = modules
    runs = {
        "crossget 1 ours": run_of("1" * 8, 144),
        "blank": run_of("10" * 4, 144),
        "crossget 0.5 ours": run_of("1" * 8, 72),
        "tome 0.5 published": run_of("1" * 6 + "00", 72),
        "tome 0.25 ours": run_of("1" * 7 + "0", 36),
    }
    report = recipe.summary(runs, {"most common answer": "1000" * 2})
    assert report["settings"]["tome 0.5 published"]["minus_default"]["value"] == -0.25
    assert "minus_default" not in report["settings"]["tome 0.25 ours"]
    lines = table.easy_vqa_table(report).splitlines()
    assert lines[0] == "| method | 0.5 (72 tokens) | 0.25 (36 tokens) | GFLOPs |"
    assert lines[2] == "| crossget | 100.00% | – | 0.72 / – |"
    assert lines[3] == "| tome | – | 87.50% | – / 0.36 |"
    assert lines[4].startswith("| tome, as published | 75.00%; -25.00 (-62.50 – ")
    assert "crossget keeps 100.00% at 0.5." in lines[-1]
    assert "most common answer 25.0%, the model, before a blank picture 50.0%" in lines[-1]


def test_stored_answers_are_compared_in_pairs(modules, tmp_path):
    paired = modules[4]
    rows = [
        {"setting": "untouched"},
        {"setting": "crossget 0.5", "right": "1100"},
        {"setting": "tome 0.5", "right": "1001"},
    ]
    (tmp_path / "demo.json").write_text(json.dumps({"rows": rows}))
    ((setting, gap),) = paired.compared(paired.read_marks(tmp_path / "demo.json"), "crossget")
    assert setting == "tome 0.5"
    assert gap["value"] == 0
    assert gap["low"] < 0 < gap["high"]
    whole = dict(paired.compared({"a b output 0.125": "11", "c output 0.125": "10"}, "a b output 0.125"))
    assert whole["c output 0.125"]["value"] == -0.5
    (tmp_path / "demo.json").write_text(json.dumps({"rows": rows[:1]}))
    with pytest.raises(ValueError, match="no right and wrong"):
        paired.read_marks(tmp_path / "demo.json")
    with pytest.raises(ValueError, match="run both"):
        paired.difference("10", "1")
