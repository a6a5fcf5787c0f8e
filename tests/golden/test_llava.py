"""A golden LLaVA with CrossGET from official names and an official ``cross_tokens.bin``: evaluation and training."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mllm_crossget import CrossGetConfig, load_official_cross_tokens, trace_merges
from mllm_crossget.checkpoint import split_official_state_dict
from mllm_crossget.ops.guidance.alignment import alignment_loss, layer_repeats
from tests.golden.files import END_TO_END, GRADIENT, LOSS, Golden

FILE = "d2_llava_e2e"
OFFICIAL_PLACEHOLDER = -200
CROSS_IMAGE = "model.vision_tower.vision_tower.vision_model.encoder.cross_image"
CROSS_TEXT = "model.cross_text"


def settings(golden, part):
    prefix = f"config.{part}."
    names = [name for name in golden.tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): golden.number(name) for name in names}


def placeholders(golden):
    """Patches of an image: the tokens that a processor makes room for."""
    vision = settings(golden, "vision")
    return (vision["image_size"] // vision["patch_size"]) ** 2


def llava(golden, folder):
    vision = CLIPVisionConfig(**settings(golden, "vision"), hidden_act="quick_gelu", layer_norm_eps=1e-5)
    text = LlamaConfig(**settings(golden, "text"), rms_norm_eps=1e-5, rope_theta=10000.0, pad_token_id=0,
                       tie_word_embeddings=False)  # fmt: skip
    unused = next(i for i in range(1, text.vocab_size) if not (golden.input("input_ids") == i).any())
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=unused,
        image_seq_length=placeholders(golden),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config).eval()
    official = golden.weights()
    model.load_state_dict(split_official_state_dict(official)[0])
    torch.save({name: official[name] for name in (CROSS_IMAGE, CROSS_TEXT)}, folder / "cross_tokens.bin")
    return load_official_cross_tokens(model, folder, config=CrossGetConfig.published(r=golden.number("r")))


def spread(row, image, fill, count):
    """A row of the official layout with its placeholder, at column ``image``, replaced by ``count`` times ``fill``."""
    return torch.cat([row[:image], torch.full((count,), fill), row[image + 1 :]])


class Batch:
    """The golden batch as a processor would make it, and where the official, shrunk columns are in it.

    Attributes:
        inputs: for the model; without labels.
        labels: for the model.
        real: (B, T) columns of the golden outputs that are no padding.
        columns: (B, T) the column of the processor's layout for each of them.
    """

    def __init__(self, golden, image_token):
        ids, mask, labels = golden.input("input_ids"), golden.input("attention_mask"), golden.input("labels")
        places, count = (ids == OFFICIAL_PLACEHOLDER).int().argmax(dim=1).tolist(), placeholders(golden)

        def spread_all(values, fill):
            return torch.stack([spread(row, at, fill, count) for row, at in zip(values, places, strict=True)])

        self.labels = spread_all(labels, -100)
        self.inputs = {
            "input_ids": spread_all(ids, image_token),
            "attention_mask": spread_all(mask, 1),
            "pixel_values": golden.input("images"),
        }
        dropped = count - golden.input("image_features").shape[1]
        columns = [list(range(at)) + list(range(at + dropped, ids.shape[1] - 1 + count)) for at in places]
        self.columns = torch.tensor(columns)
        self.real = self.inputs["attention_mask"].gather(1, self.columns).bool()

    def official(self, values):
        """(B, columns of the processor's layout, V) -> (B, T, V) in the official one."""
        return values.gather(1, self.columns[..., None].expand(-1, -1, values.shape[-1]))


def check_evaluation(golden, folder):
    model = llava(golden, folder)
    batch = Batch(golden, model.config.image_token_id)
    with torch.no_grad(), trace_merges(model) as trace:
        output = model(**batch.inputs, labels=batch.labels, output_hidden_states=True)
        features = model.get_image_features(pixel_values=batch.inputs["pixel_values"]).pooler_output
    golden.expect("image_features", torch.stack(list(features)), END_TO_END)
    golden.expect("eval.logits", batch.official(output.logits), END_TO_END, where=batch.real)
    golden.expect("eval.loss_ce", output.loss, LOSS)
    golden.expect("inputs_embeds", output.hidden_states[0], END_TO_END, where=batch.real)
    for layer, hidden in enumerate(output.hidden_states):
        golden.expect(f"eval.hidden_states.{layer}", hidden, END_TO_END, where=batch.real)
    for layer, entry in enumerate(trace[: model.config.vision_config.num_hidden_layers]):
        golden.expect(f"src_sorted.{layer}", entry.match.src, END_TO_END)
        golden.expect(f"dst_of_src.{layer}", entry.match.dst, END_TO_END)


def train(golden, folder):
    """The model in training mode, one forward, and the cross tokens as the layers' first norms see them in it."""
    model = llava(golden, folder).train()
    batch = Batch(golden, model.config.image_token_id)
    vision, text = [], []
    for layer in model.model.vision_tower.encoder.layers:  # the last token
        layer.layer_norm1.register_forward_pre_hook(lambda _, inputs: vision.append(inputs[0][:, -1].detach()))
    for layer in model.model.language_model.layers:  # the first token
        layer.input_layernorm.register_forward_pre_hook(lambda _, inputs: text.append(inputs[0][:, 0].detach()))
    output = model(**batch.inputs, labels=batch.labels)
    return model, batch, output, (torch.stack(vision), torch.stack(text))


def check_training_losses(golden, folder):
    model, batch, output, (vision, text) = train(golden, folder)
    golden.expect("train.logits", batch.official(output.logits), END_TO_END, where=batch.real)
    golden.expect("train.loss_ce", output.loss, LOSS)
    golden.expect("train.cross_tokens_image", vision, END_TO_END)
    golden.expect("train.cross_tokens_text", text, END_TO_END)
    golden.expect("train.loss_kd", output.alignment_loss, LOSS)
    golden.expect("train.loss_total", output.loss + 0.001 * output.alignment_loss, LOSS)
    projected = model.model.multi_modal_projector(vision)
    loss, image_term, text_term = alignment_loss(projected, text, torch.arange(text.shape[1]))
    golden.expect("train.loss_kd", loss, LOSS)
    golden.expect("train.kl_image", image_term, LOSS)
    golden.expect("train.kl_text", text_term, LOSS)
    golden.expect("layer_repeat", torch.tensor(layer_repeats(len(projected), len(text))), LOSS)


def check_training_gradients(golden, folder):
    model, _, output, _ = train(golden, folder)
    inner = model.model
    cross = {
        "cross_image": inner.vision_tower.encoder.cross_tokens.weight,
        "cross_text": inner.language_model.cross_tokens.weight,
    }
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad(
        output.alignment_loss, list(model.parameters()), retain_graph=True, allow_unused=True
    )
    reached = {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
    assert reached == {name for name in names if "cross_tokens" in name}
    (output.loss + 0.001 * output.alignment_loss).backward(retain_graph=True)
    total = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    for name, parameter in cross.items():
        (kd,) = torch.autograd.grad(output.alignment_loss, parameter, retain_graph=True)
        golden.expect(f"grad_kd.{name}", kd[None], GRADIENT)
        golden.expect(f"grad_total.{name}", parameter.grad[None], GRADIENT)
    golden.expect("grad_total.embed_tokens.weight", total["model.language_model.embed_tokens.weight"], GRADIENT)
    query = "layers.0.self_attn.q_proj.weight"
    golden.expect(f"grad_total.{query}", total[f"model.language_model.{query}"], GRADIENT)
    golden.expect("grad_total.mm_projector.0.weight", total["model.multi_modal_projector.linear_1.weight"], GRADIENT)


CHECKS = [check_evaluation, check_training_losses, check_training_gradients]


@pytest.mark.parametrize("check", CHECKS)
def test_llava(check, tmp_path):
    check(Golden(FILE), tmp_path)


def test_every_tensor_is_compared(tmp_path):
    golden = Golden(FILE)
    for check in CHECKS:
        check(golden, tmp_path)
    assert golden.unused() == []
