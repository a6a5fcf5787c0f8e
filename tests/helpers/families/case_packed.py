"""Images of any size, padded (Gemma 4, LFM2-VL) or packed (Mistral 3, LightOnOCR), each of which runs by itself; towers
that are left alone: MiniCPM-V, DeepSeek-VL-hybrid."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.models.minicpmv4_6 import modeling_minicpmv4_6 as minicpmv

from mllm_crossget import trace_merges
from mllm_crossget.families.family import module_at
from mllm_crossget.hooks.ground.state import handle_of
from mllm_crossget.schedule import Schedule
from tests.helpers.families.case_grid import guided
from tests.helpers.families.cases import Batch, Case, add_case
from tests.helpers.families.merging import PIXELS, expected_tokens
from tests.helpers.llava import labels_of
from tests.helpers.tiny_grid import IMAGE_TOKEN, QWEN_TEXT, TOWER, VIDEO_TOKEN, padded, rows_of, tiny

UNEVEN: list[list[tuple[int, int]]] = [[(3, 4), (2, 2)], [], [(2, 5)]]  # of every row, (rows, columns) of cells
EVEN = [[(2, 2), (2, 2)], [], [(2, 2)]]
EQUAL = ("deepseek_vl_hybrid", "llama4", "ovis2", "perception_lm")  # images have 16 cells each
Inputs = dict[str, Tensor]


def sizes_of(model_type: str) -> list[list[tuple[int, int]]]:
    """The first transformers with MiniCPM-V takes slices of one size alone."""
    return EVEN if model_type == "minicpmv4_6" and "uniform per-image" in inspect.getsource(minicpmv) else UNEVEN


def flat(model_type: str) -> list[tuple[int, int]]:
    return [size for row in sizes_of(model_type) for size in row]


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(77))


def tiny_gemma4(attention: str = "sdpa") -> nn.Module:
    """Windowed and full layers, the last two of which read the keys of the first two; embeddings of every layer's own,
    images read in both directions; cells of 3 x 3 patches of 2 x 2 pixels."""
    vision = {**TOWER, "num_key_value_heads": 4, "head_dim": 8, "patch_size": 2, "position_embedding_size": 32}
    text = {
        "model_type": "gemma4_text", "num_hidden_layers": 4, "head_dim": 8, "global_head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16, "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 100, "use_bidirectional_attention": "vision",
    }  # fmt: skip
    return tiny("gemma4", attention, vision, text, video_token_id=VIDEO_TOKEN, audio_token_id=95)


def gemma4_inputs(sizes: list[tuple[int, int]], patch: int = 3) -> Inputs:
    """Patches, padded behind the largest image's, and their (x, y), -1 for padding."""
    most = max(rows * columns for rows, columns in sizes) * patch**2
    positions = torch.full((len(sizes), most, 2), -1)
    for index, (rows, columns) in enumerate(sizes):
        y, x = torch.meshgrid(torch.arange(rows * patch), torch.arange(columns * patch), indexing="ij")
        positions[index, : y.numel()] = torch.stack([x.flatten(), y.flatten()], dim=1)
    pixels = noise(len(sizes), most, 12).sigmoid() * (positions[:, :, :1] >= 0)
    return {"pixel_values": pixels, "image_position_ids": positions}


def tiny_mistral3(attention: str = "sdpa") -> nn.Module:
    vision = {**TOWER, "model_type": "pixtral", "image_size": 56, "patch_size": 2, "head_dim": 8}
    return tiny("mistral3", attention, vision, {"model_type": "mistral", "head_dim": 8}, spatial_merge_size=2)


def mistral3_inputs(sizes: list[tuple[int, int]]) -> Inputs:
    """Images in the upper left corner of the largest; cells of 2 x 2 patches of 2 x 2 pixels."""
    pixels = torch.tensor([[4 * rows, 4 * columns] for rows, columns in sizes])
    return {"pixel_values": noise(len(sizes), 3, *pixels.amax(dim=0).tolist()), "image_sizes": pixels}


def tiny_lfm2_vl(attention: str = "sdpa") -> nn.Module:
    """A layer that convolves and one that attends; cells of 2 x 2 patches of 2 x 2 pixels."""
    vision = {
        **TOWER,
        "model_type": "siglip2_vision_model",
        "patch_size": 2,
        "num_patches": 16,
        "vision_use_head": False,
    }
    text = {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_multiple_of": 8, "conv_L_cache": 3}
    return tiny("lfm2_vl", attention, vision, text, projector_hidden_size=48)


def lfm2_vl_inputs(sizes: list[tuple[int, int]]) -> Inputs:
    shapes = torch.tensor([[2 * rows, 2 * columns] for rows, columns in sizes])
    most = int(shapes.prod(dim=1).max())
    mask = (torch.arange(most) < shapes.prod(dim=1)[:, None]).long()
    return {"pixel_values": noise(len(sizes), most, 12), "spatial_shapes": shapes, "pixel_attention_mask": mask}


def tiny_lighton_ocr(attention: str = "sdpa") -> nn.Module:
    vision = {**TOWER, "model_type": "pixtral", "image_size": 56, "patch_size": 2, "head_dim": 8}
    return tiny("lighton_ocr", attention, vision, {"model_type": "qwen3", "head_dim": 8}, spatial_merge_size=2)


def tiny_minicpmv(attention: str = "sdpa") -> nn.Module:
    """Windows behind the first layer; cells of 4 x 4 patches of 2 x 2 pixels; a layer that attends linearly."""
    vision = {**TOWER, "image_size": 16, "patch_size": 2}
    text = {"model_type": "qwen3_5_text", **QWEN_TEXT["qwen3_5"]}
    return tiny("minicpmv4_6", attention, vision, text, insert_layer_id=0, video_token_id=VIDEO_TOKEN)


def minicpmv_inputs(sizes: list[tuple[int, int]]) -> Inputs:
    """All patches side by side."""
    grids = torch.tensor([[4 * rows, 4 * columns] for rows, columns in sizes])
    return {"pixel_values": noise(1, 3, 2, 2 * int(grids.prod(dim=1).sum())), "target_sizes": grids}


def tiny_deepseek_vl_hybrid(attention: str = "sdpa") -> nn.Module:
    """4 x 4 patches of SigLIP, and SAM's 8 x 8, which convolutions make 4 x 4."""
    vision = {**TOWER, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7, "vision_use_head": False}
    high = {
        "model_type": "sam_vision_model", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 64, "patch_size": 4, "window_size": 4, "global_attn_indexes": [0, 1], "mlp_dim": 32,
        "output_channels": 8,
    }  # fmt: skip
    return tiny("deepseek_vl_hybrid", attention, vision, {"model_type": "llama"}, high_res_vision_config=high)


def tiny_ovis2(attention: str = "sdpa") -> nn.Module:
    """8 x 8 patches in squares of 2 x 2, with marks around images."""
    vision = {**TOWER, "image_size": 56, "patch_size": 7, "hidden_stride": 2, "vocab_size": 40}
    marks = {"visual_indicator_token_ids": [91, 92, 93, 94, 95], "vocab_size": 100, "hidden_size": 32}
    return tiny("ovis2", attention, vision, {"model_type": "qwen2"}, **marks)


def tiny_llama4(attention: str = "sdpa") -> nn.Module:
    """8 x 8 patches in squares of 2 x 2; a layer that attends in chunks shorter than the prompts, one with experts."""
    vision = {
        **TOWER, "image_size": 56, "patch_size": 7, "intermediate_size": 128, "vision_output_dim": 48,
        "projector_input_dim": 48, "projector_output_dim": 48,
    }  # fmt: skip
    text = {
        "head_dim": 8, "num_local_experts": 4, "moe_layers": [1], "intermediate_size_mlp": 48, "no_rope_layers": [1, 0],
        "attention_chunk_size": 16, "layer_types": ["chunked_attention", "full_attention"],
    }  # fmt: skip
    model = tiny("llama4", attention, vision, text)
    model.config.vision_feature_select_strategy = "default"  # not read, but asked for before transformers 5.23
    model.language_model.register_forward_hook(_without_image_outputs)
    return model


def _without_image_outputs(_: nn.Module, args: Any, output: Any) -> None:
    """transformers 5.24 reads ``image_outputs`` of the language model's output, which has none, and stops there."""
    if not isinstance(output, tuple) and not hasattr(output, "image_outputs"):
        output.image_outputs = None


def tiny_perception_lm(attention: str = "sdpa") -> nn.Module:
    """SigLIP's layers stand for those of timm, which is no requirement: the tower is left alone. 8 x 8 patches, pooled
    to 4 x 4."""
    vision = SiglipVisionConfig(**TOWER, image_size=56, patch_size=7, vision_use_head=False)
    vision.model_args = {"embed_dim": 32, "img_size": [56, 56], "ref_feat_shape": [8, 8]}
    pooled = {"vision_use_cls_token": False, "projector_pooling_ratio": 2, "video_token_id": VIDEO_TOKEN}
    return tiny("perception_lm", attention, vision, {"model_type": "llama"}, **pooled)


def prompt_of(model: nn.Module, inputs: Inputs) -> Batch:
    kind = model.config.model_type
    counts = [[16 if kind in EQUAL else rows * columns for rows, columns in row] for row in sizes_of(kind)]
    batch = {**padded(rows_of(counts)), **inputs}
    if kind == "ovis2":
        batch["input_ids"][[0, 2], -1] = 92  # a mark, whose embedding is another one beside images
    if kind == "gemma4":
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).long()
    return batch


def images_of(batch: Batch, start: int, count: int) -> Inputs:
    """Some of the images of a batch."""
    own = {name: values[start : start + count] for name, values in batch.items() if name in PIXELS}
    if "target_sizes" in own:  # side by side
        ends = [0, *(2 * batch["target_sizes"].prod(dim=1)).cumsum(0).tolist()]
        own["pixel_values"] = batch["pixel_values"][..., ends[start] : ends[start + count]]
    return own


def alone(batch: Batch, row: int) -> Batch:
    """One row without its padding, with its own images."""
    real = batch["attention_mask"][row] != 0
    start, count = sum(map(len, UNEVEN[:row])), len(UNEVEN[row])
    words = {name: values[row : row + 1, real] for name, values in batch.items() if name not in PIXELS}
    return {**words, **images_of(batch, start, count)} if count else words


def answers(model: nn.Module, batch: Batch) -> list[Tensor]:
    logits = model(**batch).logits
    real = (batch["attention_mask"] != 0) & (batch["input_ids"] != model.config.image_token_id)
    return [row[seen] for row, seen in zip(logits, real, strict=True)]


def features(stock: nn.Module, row: Batch) -> list[Tensor]:
    """(n, D) features of every image of a row, one at a time, from the stock code."""
    if "pixel_values" not in row:
        return []
    count = len(row["target_sizes"] if "target_sizes" in row else row["pixel_values"])
    single = [images_of(row, index, 1) for index in range(count)]
    outputs = [getattr(stock, "model", stock).get_image_features(**one, return_dict=True) for one in single]
    return [(one.last_hidden_state if one.pooler_output is None else one.pooler_output)[0] for one in outputs]


def expected(stock: nn.Module, model: nn.Module, batch: Batch, **options: Any) -> list[list[int]]:
    rows = [alone(batch, row) for row in range(len(UNEVEN))]
    stacked = model.config.model_type in EQUAL
    with encoders_states(stock, model), guided(stock, model):
        return expected_tokens(stock, model, rows, features, stacked=stacked, **options)


@contextmanager
def encoders_states(stock: nn.Module, model: nn.Module) -> Iterator[None]:
    """Where the other model reduces its tower, the stock encoder's states become those of its tokens, copied to every
    patch of one image by hand."""
    path, tower = handle_of(model).encoder_path, handle_of(model).family.tower
    calls: list[tuple[tuple, dict]] = []
    made: list[Tensor] = []

    def replace(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        with trace_merges(model) as trace:
            module_at(model, tower)(*calls[-1][0], **calls[-1][1])
        whole = made.pop()
        assert whole.shape == output.last_hidden_state.shape
        source = trace[-1].source[0].tolist()
        patches = len(source) - handle_of(model).schedule.cross
        first = [source.index(source[patch]) for patch in range(patches)]
        ordered = whole.roll(handle_of(model).tower.geometry.prefix, dims=1)  # Llama 4 has its class token last
        assert torch.equal(ordered[:, :patches], ordered[:, first])  # patches of one token have one state
        output.last_hidden_state = whole
        return output

    with ExitStack() as stack:
        if path:
            for hook in (
                module_at(stock, tower).register_forward_pre_hook(
                    lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
                ),
                module_at(stock, path).register_forward_hook(replace, with_kwargs=True),
                module_at(model, path).register_forward_hook(
                    lambda _, args, output: made.append(output.last_hidden_state)
                ),
            ):
                stack.callback(hook.remove)
        yield


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch, labels=labels_of(model, batch), use_cache=False).loss


BUILDS: dict[str, tuple[Callable[..., nn.Module], Callable[[list[tuple[int, int]]], Inputs]]] = {
    "gemma4": (tiny_gemma4, gemma4_inputs),
    "mistral3": (tiny_mistral3, mistral3_inputs),
    "lfm2_vl": (tiny_lfm2_vl, lfm2_vl_inputs),
    "lighton_ocr": (tiny_lighton_ocr, mistral3_inputs),
    "minicpmv4_6": (tiny_minicpmv, minicpmv_inputs),
    "deepseek_vl_hybrid": (
        tiny_deepseek_vl_hybrid,
        lambda sizes: {
            "pixel_values": noise(len(sizes), 3, 28, 28),
            "high_res_pixel_values": noise(len(sizes), 3, 64, 64),
        },
    ),
    "llama4": (tiny_llama4, lambda sizes: {"pixel_values": noise(len(sizes), 3, 56, 56)}),
    "perception_lm": (tiny_perception_lm, lambda sizes: {"pixel_values": noise(len(sizes), 1, 3, 56, 56)}),
    "ovis2": (tiny_ovis2, lambda sizes: {"pixel_values": noise(len(sizes), 3, 56, 56)}),
}

PER_SIDE = {"gemma4": 3, "lfm2_vl": 2, "lighton_ocr": 2, "mistral3": 2}  # patches of a cell, where towers are reduced
WHOLE = {"llama4": 65, "ovis2": 64}  # patches of every image, in reduced towers that take one size


def runs(model_type: str) -> list[tuple[int, int]]:
    """(images, patches of each) of every run of the layers: sizes from small to large, or image by image."""
    if model_type in WHOLE:
        return [(len(flat(model_type)), WHOLE[model_type])]
    patches = [rows * columns * PER_SIDE[model_type] ** 2 for rows, columns in flat(model_type)]
    if model_type in ("lighton_ocr", "mistral3"):
        return [(1, count) for count in patches]
    return [(patches.count(count), count) for count in sorted(set(patches))]


def first_schedule(model: nn.Module) -> Schedule:
    """Counts of the image that is encoded first; behind the projector groups of one size, the smallest first."""
    kind = model.config.model_type
    tokens = runs(kind)[0][1] if kind in PER_SIDE or kind in WHOLE else (16 if kind in EQUAL else 4)
    handle = handle_of(model)
    return (handle.tower or handle.merge).schedule(tokens)


for model_type, (build, inputs_of) in BUILDS.items():
    add_case(
        Case(
            name=model_type,
            model_type=model_type,
            build=build,
            batch=lambda model, inputs_of=inputs_of: prompt_of(model, inputs_of(flat(model.config.model_type))),
            row=alone,
            answers=answers,
            dial={"keep_ratio": 0.4},
            loss=loss,
            generates=True,
            expected=expected,
            sizes_differ=model_type in PER_SIDE,
            schedule=first_schedule,
            methods=() if model_type in ("gemma4", *WHOLE) else ("crossget",),
        )
    )
