"""Golden Llama with CrossGET's text cross tokens, as the language model of a LLaVA that gets text alone."""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mllm_crossget import CrossGetConfig, accelerate_mllm, restore_mllm
from mllm_crossget.checkpoint import split_official_state_dict
from tests.golden.files import END_TO_END, Golden

FILE = "d1_llama_cross_text"


def llava(golden):
    """The golden Llama inside a LLaVA with some small tower; accelerated, with the golden cross tokens."""
    names = [name for name in golden.tensors if name.startswith("config.")]
    settings = {name.removeprefix("config."): golden.number(name) for name in names}
    text = LlamaConfig(**settings, rms_norm_eps=1e-5, rope_theta=10000.0, pad_token_id=0, tie_word_embeddings=False)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                              image_size=28, patch_size=14)  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=settings["vocab_size"], tie_word_embeddings=False
    )
    model = LlavaForConditionalGeneration(config).eval()
    weights, cross = split_official_state_dict(golden.weights())
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.startswith(("model.vision_tower", "model.multi_modal_projector")) for name in missing)
    accelerate_mllm(model, CrossGetConfig(r=1))
    model.model.language_model.cross_tokens.weight.data.copy_(cross["text.cross"])
    return model


def check_prefill(golden):
    ids, mask = golden.input("input_ids"), golden.input("attention_mask")
    model = llava(golden)
    output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    golden.expect("logits", output.logits, END_TO_END, where=mask.bool())
    for layer, hidden in enumerate(output.hidden_states):
        golden.expect(f"hidden_states.{layer}", hidden, END_TO_END, where=mask.bool())


def check_without_cross_tokens(golden):
    ids, mask = golden.input("input_ids"), golden.input("attention_mask")
    model = llava(golden)
    model.model.language_model.cross_tokens.weight.data.zero_()
    zero = model(input_ids=ids, attention_mask=mask).logits
    golden.expect("zero_cross.logits", zero, END_TO_END, where=mask.bool())
    plain = restore_mllm(model)(input_ids=ids, attention_mask=mask).logits
    golden.expect("zero_cross.logits", plain, END_TO_END, where=mask.bool())


def check_decoding(golden):
    prompt, tokens = golden.input("input_ids")[:1], [golden.input(f"decode_token{n}") for n in (1, 2)]
    model = llava(golden)
    step = model(input_ids=prompt, use_cache=True)
    golden.expect("decode_prompt_logits", step.logits, END_TO_END)
    for n, token in enumerate(tokens, start=1):
        step = model(input_ids=token, past_key_values=step.past_key_values, use_cache=True)
        golden.expect(f"decode_logits{n}", step.logits, END_TO_END)
    whole = model(input_ids=torch.cat([prompt, *tokens], dim=1), use_cache=False)
    golden.expect("full_rerun_logits", whole.logits, END_TO_END)


@torch.no_grad()
def test_prefill():
    check_prefill(Golden(FILE))


@torch.no_grad()
def test_without_cross_tokens():
    check_without_cross_tokens(Golden(FILE))


@torch.no_grad()
def test_cached_steps_do_not_write_again():
    check_decoding(Golden(FILE))


@torch.no_grad()
def test_left_padding_moves_the_cross_token_with_the_first_real_token():
    """The golden rows are right-padded; here the same rows are padded on the left."""
    golden = Golden(FILE)
    ids, mask = golden.input("input_ids"), golden.input("attention_mask")
    shifts = (mask == 0).sum(dim=1)
    order = torch.stack([torch.arange(ids.shape[1]).roll(int(shift)) for shift in shifts])
    logits = llava(golden)(input_ids=ids.gather(1, order), attention_mask=mask.gather(1, order)).logits
    back = torch.stack([logits[row].roll(-int(shift), 0) for row, shift in enumerate(shifts)])
    golden.expect("logits", back, END_TO_END, where=mask.bool())


@torch.no_grad()
def test_every_tensor_is_compared():
    golden = Golden(FILE)
    for check in (check_prefill, check_without_cross_tokens, check_decoding):
        check(golden)
    assert golden.unused() == []
