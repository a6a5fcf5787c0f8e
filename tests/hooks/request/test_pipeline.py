"""``pipeline("image-text-to-text")`` with a processor made on the spot: words as tokens, CLIP's image processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast, pipeline

from tests.helpers.generation import Case
from tests.helpers.tiny import BOS, EOS, PAD

WORDS = 100


def word_processor(case: Case) -> LlavaProcessor:
    """Tokens "w3" ... and "<image>"; placeholders are written as the real processor writes them."""
    vocab = {f"w{i}": i for i in range(WORDS - 1)}
    for name, index in (("<pad>", PAD), ("<s>", BOS), ("</s>", EOS)):
        del vocab[f"w{index}"]
        vocab[name] = index
    vocab["<image>"] = case.model.config.image_token_id
    inner = Tokenizer(models.WordLevel(vocab, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    size = case.model.config.vision_config.image_size
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    images = kind(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    vision = case.model.config.vision_config
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=case.model.config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token="<image>",
    )


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 80, 3), dtype=np.uint8))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline_answers_as_the_oracle(case: Case, batch_size) -> None:
    processor = word_processor(case)
    pipe = pipeline("image-text-to-text", model=case.model, processor=processor, device="cpu")
    texts = ["w10 <image> w11 w12", "w20 w21 <image> w22 w23 w24"][:batch_size]
    images = [picture(seed) for seed in range(batch_size)]
    options = {"max_new_tokens": 6, "do_sample": False}
    answers = pipe(text=texts, images=images, batch_size=batch_size, generate_kwargs=options, return_full_text=False)
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    expected = case.oracle.new_tokens(case.model, {**batch}, **options)
    said = [answer if isinstance(answer, dict) else answer[0] for answer in answers]
    assert [answer["generated_text"].split() for answer in said] == [[f"w{i}" for i in row] for row in expected]


def test_processors_prompt_decodes_to_itself(case: Case) -> None:
    """The user's slicing ``out[:, inputs.input_ids.shape[1]:]`` gives the answer and nothing of the prompt."""
    processor = word_processor(case)
    inputs = processor(text="w10 <image> w11", images=picture(0), return_tensors="pt")
    options = {"max_new_tokens": 6, "do_sample": False}
    out = case.model.generate(**inputs, **options)
    assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).split()
    assert answer == [
        f"w{i}" for i in case.oracle.new_tokens(case.model, {**inputs}, max_new_tokens=6, do_sample=False)[0]
    ]
