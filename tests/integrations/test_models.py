"""The evaluation classes without a command line: many images, both modes, BLIP-2, resuming, and errors."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Blip2Processor,
    InstructBlipProcessor,
    PreTrainedTokenizerFast,
)

from mllm_crossget import accelerate_mllm, save_crossget
from mllm_crossget.costs import model_flops
from mllm_crossget.embedded import WEIGHTS_FOLDER, answer, held_out_questions
from mllm_crossget.embedded.questions import WORDS
from mllm_crossget.methods import CrossGetConfig
from mllm_crossget.training import lora_config
from tests.helpers.tiny_blip import IMAGE, QUERIES, VOCAB, tiny_blip2

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install 'mllm-crossget[eval]'")

from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model

GREEDY = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
PICTURES = (1, 0, 2, 1, 3, 1, 0, 1)  # per question


@pytest.fixture(scope="module")
def questions():
    return [question for question in held_out_questions(60) if question.kind != "caption"][: len(PICTURES)]


def instances(questions, simple, pictures=PICTURES, generation=GREEDY, **metadata):
    """What lmms-eval hands over, and the documents that it refers to."""
    docs = [
        {"text": question.text, "images": [question.image] * count}
        for question, count in zip(questions, pictures, strict=True)
    ]

    def to_messages(doc):
        content = [{"type": "image", "url": image} for image in doc["images"]]
        return [{"role": "user", "content": [*content, {"type": "text", "text": doc["text"]}]}]

    def request(index, doc):
        if simple:
            arguments = (doc["text"], dict(generation), lambda d: d["images"], index, "toy", "test")
        else:
            arguments = (doc["text"], to_messages, dict(generation), index, "toy", "test")
        return Instance("generate_until", arguments, 0, {"task": "toy", "doc_id": index, "repeats": 1, **metadata})

    return [request(index, doc) for index, doc in enumerate(docs)], {"toy": {"test": docs}}


def answers(questions, name="llava_hf_crossget", simple=False, pictures=PICTURES, generation=GREEDY, **arguments):
    kind = get_model(name, force_simple=simple)
    model = kind(**{"pretrained": "embedded", "device": "cpu", **arguments})
    requests, model.task_dict = instances(questions, simple, pictures, generation)
    return model.generate_until(requests), model


def texts(results):
    return [result.text for result in results]


def begin_with(longer, shorter):
    return all(text.startswith(beginning) for text, beginning in zip(longer, shorter, strict=True))


def test_rows_with_none_one_and_several_images(questions):
    one, model = answers(questions, keep_ratio=0.5, batch_size=1)
    for size in (3, 8):
        assert texts(answers(questions, keep_ratio=0.5, batch_size=size)[0]) == texts(one)
    records = [record for batch in model._log.batches for record in batch["answers"]]
    assert [record["visual_tokens"] for record in records] == [72 * count for count in PICTURES]
    assert [result.token_counts.input_tokens for result in one] == [record["input_tokens"] for record in records]
    config, method = model._model.config, CrossGetConfig(keep_ratio=0.5)
    for record, count in zip(records, PICTURES, strict=True):
        words = record["input_tokens"] - record["visual_tokens"]
        flops = model_flops(
            config, method, images=count, text_tokens=words, new_tokens=record["new_tokens"], one_softmax=True
        )
        assert record["gflops"] == flops.total / 1e9


def test_answers_are_those_of_generate(questions):
    """Row by row, with the processor called by hand."""
    found, model = answers(questions, keep_ratio=0.5, batch_size=8)
    processor = AutoProcessor.from_pretrained(WEIGHTS_FOLDER)
    for question, count, text in zip(questions, PICTURES, texts(found), strict=True):
        chat = [{"role": "user", "content": [{"type": "image"}] * count + [{"type": "text", "text": question.text}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(images=[question.image] * count or None, text=prompt, return_tensors="pt")
        output = model._model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() == text


def test_simple_mode_answers_the_same(questions):
    chat, _ = answers(questions, keep_ratio=0.5, batch_size=4)
    simple, _ = answers(questions, simple=True, keep_ratio=0.5, batch_size=4)
    assert texts(chat) == texts(simple)


def test_baseline_is_the_untouched_model(questions):
    _, model = answers(questions, reduction="none", batch_size=8)
    assert type(model._model).__name__ == "LlavaForConditionalGeneration"
    assert model._log.batches[0]["answers"][2]["visual_tokens"] == 2 * 144


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own look-up
@pytest.mark.parametrize("lora", [False, True], ids=["cross tokens", "LoRA and cross tokens"])
def test_an_adapter_answers_what_it_was_trained_to(questions, tmp_path, lora):
    processor = AutoProcessor.from_pretrained(WEIGHTS_FOLDER)
    model = AutoModelForImageTextToText.from_pretrained(WEIGHTS_FOLDER, dtype=torch.float32).eval()
    untrained = accelerate_mllm(model, CrossGetConfig.published(keep_ratio=0.25))  # cross tokens change answers there
    plain = answer(untrained, processor, questions)
    if lora:
        model = get_peft_model(untrained, lora_config(untrained, r=4, alpha=8, dropout=0.0))
    for name, parameter in model.named_parameters():
        if "cross_tokens" in name or "lora_B" in name:
            parameter.data.normal_(std=0.15 if "lora_B" in name else 3.0)
    if lora:
        model.save_pretrained(tmp_path)
    save_crossget(model, tmp_path)
    expected = answer(model.eval(), processor, questions)  # cut where right answers end
    options = {"pictures": (1,) * len(questions), "dtype": "float32", "generation": {**GREEDY, "max_new_tokens": 24}}
    found, _ = answers(questions, adapter=str(tmp_path), **options)
    assert begin_with(texts(found), expected)
    assert not begin_with(texts(found), plain)


def test_the_order_of_groups_is_undone(questions):
    """Requests with other generation settings go into other batches; the answers come back in the tasks' order."""
    kind = get_model("llava_hf_crossget")
    model = kind(pretrained="embedded", keep_ratio=0.5, batch_size=8, device="cpu")
    short, docs = instances(questions, False, generation={**GREEDY, "max_new_tokens": 1})
    long, _ = instances(questions, False)
    model.task_dict = docs
    mixed = [request for pair in zip(short, long, strict=True) for request in pair]
    found = model.generate_until(mixed)
    assert [found[i].token_counts.output_tokens for i in range(0, 16, 2)] == [1] * 8
    assert texts(found[1::2]) == texts(answers(questions, keep_ratio=0.5, batch_size=8)[0])


def test_stop_strings_of_a_task_cut_the_answer(questions):
    picture = [question for question in held_out_questions(60) if question.kind == "caption"][:1]
    long = {**GREEDY, "max_new_tokens": 32}
    whole = texts(answers(picture, pictures=(1,), generation=long, reduction="none")[0])[0]
    cut = texts(answers(picture, pictures=(1,), generation={**long, "until": [" ,"]}, reduction="none")[0])[0]
    assert whole.count(",") > 0
    assert cut == whole.split(" ,")[0]


def test_requests_that_only_fill_up_cost_nothing(questions):
    kind = get_model("llava_hf_crossget")
    model = kind(pretrained="embedded", keep_ratio=0.5, batch_size=8, device="cpu")
    requests, model.task_dict = instances(questions, False)
    filling, _ = instances(questions[-1:], False, pictures=(1,), __padding_only__=True)
    found = model.generate_until([*requests, *filling])
    assert len(found) == 9
    assert sum(len(batch["answers"]) for batch in model._log.batches) == 8


def test_a_killed_run_repeats_no_finished_batch(questions, tmp_path):
    arguments = {"keep_ratio": 0.5, "batch_size": 2, "journal": str(tmp_path)}
    expected, _ = answers(questions, **arguments)
    log = tmp_path / "answers.rank0.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) == 5  # the run's settings and four batches
    log.write_text("".join(lines[:3]) + lines[3][:40])  # killed while the third batch was written
    found, model = answers(questions, **arguments)
    assert texts(found) == texts(expected)
    again = log.read_text().splitlines(keepends=True)
    assert again[:3] == lines[:3]
    assert len(again) == 5
    assert len(model._log.batches) == 4  # of both runs


def test_answers_of_another_setting_are_refused(questions, tmp_path):
    answers(questions, keep_ratio=0.5, batch_size=8, journal=str(tmp_path))
    with pytest.raises(ValueError, match=r"other settings.*reduction"):
        answers(questions, keep_ratio=0.25, batch_size=8, journal=str(tmp_path))


def test_an_error_is_raised_and_ends_the_process_under_the_command_line(questions, monkeypatch):
    _, model = answers(questions, keep_ratio=0.5, batch_size=8)
    requests, _ = instances(questions, False, generation={**GREEDY, "max_new_tokens": 3})

    def fails(*arguments, **options):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(model._model, "generate", fails)
    with pytest.raises(RuntimeError, match="no memory left"):
        model.generate_until(requests)
    monkeypatch.setenv("VERBOSITY", "INFO")
    with pytest.raises(SystemExit, match="RuntimeError: no memory left"):
        model.generate_until(requests)


@pytest.mark.parametrize("call", ["loglikelihood", "generate_until_multi_round"])
def test_other_kinds_of_requests_are_refused(questions, call):
    _, model = answers(questions[:1], pictures=(1,), reduction="none")
    with pytest.raises(NotImplementedError, match="choose"):
        getattr(model, call)([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": "auto"}, "batch_size must be a whole number"),
        ({"keep_ratio": 0.5, "r": 2}, "same dial"),
        ({"reduction": "none", "keep_ratio": 0.5}, "reduction=none leaves nothing to set"),
        ({"reduction": "tome"}, "method="),
        ({"keep_ration": 0.5}, r"keep_ration.*keep_ratio"),
        ({"device_map": "auto"}, "give one of them"),
        ({"dtype": "half"}, "float16"),
    ],
)
def test_wrong_arguments_say_what_is_right(arguments, message):
    with pytest.raises(ValueError, match=message):
        get_model("llava_hf_crossget")(pretrained="embedded", device="cpu", **arguments)


def blip2(folder, model_type, text):
    """A tiny random BLIP-2 or InstructBLIP and its processor, saved."""
    tiny_blip2(model_type, text).save_pretrained(folder)
    words = dict(enumerate(["<pad>", "<s>", "</s>", *WORDS]))
    vocabulary = {words.get(i, f"word{i}"): i for i in range(VOCAB)}
    vocabulary["<image>"] = vocabulary.pop(f"word{IMAGE}")
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    backend.normalizer, backend.pre_tokenizer = Lowercase(), Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
    size = {"height": 56, "width": 56}
    pictures = AutoProcessor.from_pretrained(WEIGHTS_FOLDER).image_processor
    pictures.size = pictures.crop_size = size
    if model_type == "instructblip":
        InstructBlipProcessor(pictures, tokenizer, tokenizer, num_query_tokens=QUERIES).save_pretrained(folder)
    else:
        Blip2Processor(pictures, tokenizer, num_query_tokens=QUERIES).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("reduction", "tokens"), [({"reduction": "none"}, 17), ({"keep_ratio": 0.5}, 8)], ids=str)
@pytest.mark.parametrize(("model_type", "text"), [("blip-2", "opt"), ("blip-2", "t5"), ("instructblip", "llama")])
def test_blip2_answers_in_batches(questions, tmp_path, model_type, text, reduction, tokens):
    folder = blip2(tmp_path / "model", model_type, text)
    options = {"name": "blip2_hf_crossget", "pictures": (1,) * 8, "pretrained": folder, **reduction}
    one, model = answers(questions, batch_size=1, **options)
    assert len(set(texts(one))) > 2
    assert all(1 <= result.token_counts.output_tokens <= 6 for result in one)  # without the prompt
    assert all(result.token_counts.input_tokens > 4 for result in one)
    records = [record for batch in model._log.batches for record in batch["answers"]]
    assert {record["visual_tokens"] for record in records} == {QUERIES}
    assert {record["tower_tokens"] for record in records} == {tokens}
    assert all(record["gflops"] > 0 for record in records)
    for simple in (False, True):
        assert texts(answers(questions, batch_size=3, simple=simple, **options)[0]) == texts(one)
    assert json.loads(json.dumps(model._log.batches))[0]["seconds"]["encoder"] > 0


def test_blip2_takes_one_image(questions, tmp_path):
    folder = blip2(tmp_path / "model", "blip-2", "opt")
    with pytest.raises(ValueError, match="one image in a request"):
        answers(questions, name="blip2_hf_crossget", pretrained=folder, reduction="none", batch_size=8)
