"""DeepSeek-OCR 2: an image with a tile, and one without; 144 queries for a tile and for a view, and a separator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.hooks.ground.state import handle_of
from tests.helpers.families.case_packed import answers, loss, noise
from tests.helpers.families.cases import Batch, Case, add_case
from tests.helpers.families.merging import PIXELS, expected_tokens
from tests.helpers.tiny_grid import padded, rows_of, tiny

QUERIES = 144
TILES: list[list[int]] = [[1], [], [0]]  # of every image of every row


def tiny_deepseek_ocr2(attention: str = "sdpa") -> nn.Module:
    """SAM's tower leaves 2 x 2 patches; one dense layer of the language model and one of experts."""
    sam = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 4,
        "window_size": 4, "global_attn_indexes": [1], "output_channels": 8, "downsample_channels": [8, 32],
    }  # fmt: skip
    encoder = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
               "num_key_value_heads": 2}  # fmt: skip
    text = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse"]}  # fmt: skip
    return tiny("deepseek_ocr2", attention, {"sam_config": sam, "encoder_config": encoder}, text)


def parts(tiles: int) -> list[int]:
    return [*[QUERIES] * tiles, QUERIES, 1]


def batch_of(model: nn.Module) -> Batch:
    """Rows of one image each, or none."""
    counts = [[sum(parts(tiles)) for tiles in row] for row in TILES]
    return {
        **padded(rows_of(counts)),
        "pixel_values": noise(2, 3, 32, 32),
        "pixel_values_local": noise(1, 3, 32, 32).flip(0, -1),
        "num_local_patches": torch.tensor([1, 0]),
    }


def alone(batch: Batch, row: int) -> Batch:
    """One row without its padding, with its own image."""
    real = batch["attention_mask"][row] != 0
    words = {name: values[row : row + 1, real] for name, values in batch.items() if name not in PIXELS}
    image = {
        0: {"pixel_values_local": batch["pixel_values_local"], "num_local_patches": batch["num_local_patches"][:1]},
        2: {"num_local_patches": batch["num_local_patches"][1:]},
    }.get(row)
    if image is None:
        return words
    place = slice(0, 1) if row == 0 else slice(1, 2)
    return {**words, **image, "pixel_values": batch["pixel_values"][place]}


def features(stock: nn.Module, row: Batch) -> list[Tensor]:
    """(n, D) features of every part of a row's image, from the stock code."""
    if "pixel_values" not in row:
        return []
    own = {name: values for name, values in row.items() if name in PIXELS}
    (image,) = stock.model.get_image_features(**own, return_dict=True).pooler_output
    return list(image.split(parts(int(row["num_local_patches"]))))


def expected(stock: nn.Module, model: nn.Module, batch: Batch, **options: Any) -> list[list[int]]:
    rows = [alone(batch, row) for row in range(len(TILES))]
    return expected_tokens(stock, model, rows, features, stacked=False, **options)


add_case(
    Case(
        name="deepseek_ocr2",
        model_type="deepseek_ocr2",
        build=tiny_deepseek_ocr2,
        batch=batch_of,
        row=alone,
        answers=answers,
        dial={"keep_ratio": 0.2},
        loss=loss,
        generates=True,
        expected=expected,
        schedule=lambda model: handle_of(model).merge.schedule(QUERIES),  # the separator, alone, is not merged
        methods=("crossget",),
    )
)
