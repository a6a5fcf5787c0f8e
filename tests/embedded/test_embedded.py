"""The embedded model and its test set: honest split, right answers, and the accuracy that the demo builds on."""

import random
from dataclasses import fields

import pytest
import torch
from transformers import AutoProcessor

from mllm_crossget.embedded import (
    KINDS,
    WEIGHTS_FOLDER,
    answer,
    batch_inputs,
    held_out_questions,
    load_embedded,
    score,
)
from mllm_crossget.embedded.architecture import VISUAL_TOKENS, build_model, build_processor
from mllm_crossget.embedded.pretraining import IGNORE, answer_loss, pack_questions, see
from mllm_crossget.embedded.questions import PRACTICE_KINDS, ask
from mllm_crossget.embedded.scenes import (
    CANVAS,
    Scene,
    digit_range,
    photo_range,
    photographs,
    render,
    sample_layouts,
    to_tensor,
)
from tests.helpers.versions import TRAINS


@pytest.fixture(scope="module")
def loaded():
    torch.manual_seed(0)
    return load_embedded()


def layouts(split: str, count: int = 500):
    return sample_layouts(count, split, torch.Generator().manual_seed(5))


def slow_answer(kind: str, text: str, scene: Scene) -> str:
    """The answer worked out again from the words of the question alone."""
    words = text.rstrip("?.").split()
    match kind:
        case "digit_by_colour":
            (item,) = [item for item in scene.items if item.colour == words[-1]]
            return str(item.digit)
        case "colour_by_digit":
            (item,) = [item for item in scene.items if str(item.digit) == words[-1]]
            return item.colour
        case "position":
            (item,) = [item for item in scene.items if [item.row, item.column] == words[-2:]]
            return str(item.digit)
        case "count":
            return str(sum(1 for _ in scene.items))
        case "exists":
            return "yes" if words[-1] in [str(item.digit) for item in scene.items] else "no"
        case "largest":
            return max(str(item.digit) for item in scene.items)
        case "sum":
            digit = {item.colour: item.digit for item in scene.items}
            one, other = digit[words[-3]], digit[words[-1]]
            return f"{one} and {other} is {one + other}"
        case "caption":
            return " , ".join(f"a {item.colour} {item.digit}" for item in scene.items) + " ."
    raise AssertionError(kind)


def test_weights_are_small_and_load_with_the_auto_classes(loaded) -> None:
    model, _ = loaded
    assert sum(path.stat().st_size for path in WEIGHTS_FOLDER.iterdir()) <= 8_000_000
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert model.config.vision_feature_layer == -2
    assert not model.training
    assert type(AutoProcessor.from_pretrained(WEIGHTS_FOLDER)).__name__ == "LlavaProcessor"


def test_splits_share_no_digit_and_no_background() -> None:
    assert digit_range("train")[1] <= digit_range("test")[0]
    assert photo_range("train")[1] <= photo_range("test")[0]
    height, width = photographs().shape[-2:]
    for split in ("train", "test"):
        layout = layouts(split)
        first, last = digit_range(split)
        assert ((layout.source >= first) & (layout.source < last)).all()
        left, right = (edge * width / height for edge in photo_range(split))
        assert (layout.crop[:, 0] >= left - 1e-6).all()
        assert (layout.crop[:, 0] + layout.crop[:, 2] <= right + 1e-6).all()


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'train' or 'test', got 'valid'"):
        sample_layouts(1, "valid", torch.Generator())


def test_rendering_is_deterministic_and_independent_of_the_batch() -> None:
    layout = layouts("test", 6)
    again = layouts("test", 6)
    assert all(torch.equal(getattr(layout, part.name), getattr(again, part.name)) for part in fields(layout))
    pixels, ink = render(layout)
    assert pixels.shape == (6, 3, CANVAS, CANVAS)
    assert torch.equal(pixels, render(again)[0])
    assert torch.equal(pixels[2:4], render(layout.select(slice(2, 4)))[0])
    assert (ink.flatten(2).sum(-1) > 1).eq(layout.present).all()


def test_digits_are_drawn_where_and_in_the_colour_that_the_scene_says() -> None:
    layout = layouts("test", 50)
    ink = render(layout)[1].flatten(2)
    y, x = torch.meshgrid(torch.arange(CANVAS) + 0.5, torch.arange(CANVAS) + 0.5, indexing="ij")
    weight = ink / ink.sum(-1, keepdim=True).clamp(min=1)
    column = (weight @ x.flatten() / 32).long()
    row = (weight @ y.flatten() / 32).long()
    assert torch.equal((row * 3 + column)[layout.present], layout.cell[layout.present])


def test_test_set_is_fixed_and_large() -> None:
    questions = held_out_questions()
    assert len(questions) >= 2000
    assert {question.kind for question in questions} == set(KINDS)
    start = held_out_questions(limit=30)
    assert [(q.text, q.answer) for q in start] == [(q.text, q.answer) for q in questions[:30]]
    assert torch.equal(to_tensor(start[-1].image), to_tensor(questions[29].image))
    with pytest.raises(ValueError, match="at least 1 or None"):
        held_out_questions(limit=0)


def test_answers_agree_with_a_slow_recomputation() -> None:
    for question in held_out_questions():
        assert question.answer == slow_answer(question.kind, question.text, question.scene), question.text


def test_questions_need_their_words_and_yes_is_half() -> None:
    scene = layouts("train", 1).scenes()[0]
    chance = random.Random(0)
    assert len({ask(scene, "sum", chance) for _ in range(50)}) > 1
    answers = [question.answer for question in held_out_questions() if question.kind == "exists"]
    assert 0.4 < answers.count("yes") / len(answers) < 0.6
    with pytest.raises(ValueError, match="kind must be one of"):
        ask(scene, "weather", chance)


def test_vocabulary_covers_every_question_and_answer() -> None:
    tokenizer, chance = build_processor().tokenizer, random.Random(1)
    for scene in layouts("train", 60).scenes():
        for kind in (*KINDS, *PRACTICE_KINDS):
            question, words = ask(scene, kind, chance) or ("", "")
            ids = tokenizer(f"USER: <image>\n{question} ASSISTANT: {words}</s>").input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(tokenizer(words).input_ids, skip_special_tokens=True) == words


def test_processor_expands_the_image_and_pads_left(loaded) -> None:
    model, processor = loaded
    questions = [question for question in held_out_questions(limit=6) if question.kind in ("count", "sum")]
    inputs = batch_inputs(processor, questions)
    ids = inputs["input_ids"]
    assert (ids == model.config.image_token_id).sum(1).tolist() == [VISUAL_TOKENS] * len(questions)
    assert (ids == processor.tokenizer.bos_token_id).sum(1).tolist() == [1] * len(questions)
    assert ids[0, 0] == processor.tokenizer.pad_token_id
    assert inputs["pixel_values"].shape[1:] == (3, CANVAS, CANVAS)


@pytest.mark.skipif(
    not TRAINS,
    reason="older transformers mark the answer in front of the image's expansion",
)
def test_chat_template_marks_answer_and_end(loaded) -> None:
    _, processor = loaded
    question = held_out_questions(limit=1)[0]
    chat = [
        {"role": "user", "content": [{"type": "image", "image": question.image}, {"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": [{"type": "text", "text": question.answer}]},
    ]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(chat, **options)
    marked = inputs["input_ids"][0][inputs["assistant_masks"][0].bool()]
    assert processor.tokenizer.decode(marked) == f"{question.answer} </s>"


def test_training_forward_equals_the_models_own() -> None:
    """The packed rows of pre-training give the logits of ordinary one-question prompts."""
    model, processor = build_model(seed=3).eval(), build_processor()
    layout = layouts("train", 1)
    pixels, scenes = render(layout)[0], layout.scenes()
    pack = pack_questions(scenes, processor.tokenizer, random.Random(0))
    with torch.inference_mode():
        _, visual = see(model, pixels)
        features = model.model.get_image_features(pixel_values=pixels * 2 - 1).pooler_output
        torch.testing.assert_close(visual, torch.stack(list(features)))
        ends = (pack.ids[0] == processor.tokenizer.eos_token_id).nonzero()[0].item() + 1
        ids, labels = pack.ids[:, :ends], pack.labels[:, :ends]
        logits = model(input_ids=ids, pixel_values=pixels * 2 - 1).logits[labels != IGNORE]
        expected = torch.nn.functional.cross_entropy(logits, labels[labels != IGNORE])
        pack.labels[:, ends:] = IGNORE
        torch.testing.assert_close(answer_loss(model, visual, pack)[0], expected)


def test_score_needs_an_answer_for_every_question() -> None:
    with pytest.raises(ValueError, match="got 0 for 1 questions"):
        score(held_out_questions(limit=1), [])


def test_accuracy_on_held_out_questions(loaded) -> None:
    model, processor = loaded
    questions = held_out_questions(limit=200)
    result = score(questions, answer(model, processor, questions))
    assert result.overall.share >= 0.88, result.as_dict()
