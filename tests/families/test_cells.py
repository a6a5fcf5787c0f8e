"""Qwen-VL towers, in which whole cells of the patch merger move: a slow loop over the layers, exact laws, schedules."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mllm_crossget import CrossGetConfig, ToMeConfig, accelerate_mllm, restore_mllm, trace_merges
from mllm_crossget.config import method_class
from mllm_crossget.costs.flops import model_flops
from mllm_crossget.costs.geometries.llava import resolve
from mllm_crossget.hooks.ground.state import handle_of
from mllm_crossget.hooks.projector.groups import groups_of
from mllm_crossget.hooks.projector.post_merge import kept_cells
from mllm_crossget.hooks.tower.cell_matching import allotted
from mllm_crossget.look.visualize import merged_groups, tokens_per_layer
from tests.helpers import reference
from tests.helpers.families.case_qwen import GRIDS, Grid, alone, batch_from, cells_of, patches
from tests.helpers.families.merging import merge_by_hand, steps
from tests.helpers.gradients import assert_same_gradients, checkpoint_activations, gradients
from tests.helpers.methods import FIXED
from tests.helpers.tiny_grid import tiny_qwen

TYPES = ["qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl"]  # the mixtures of experts have the same towers
ALL_TYPES = [*TYPES, "glm4v", "glm_ocr"]
GRID = (1, 6, 8)
WINDOWS = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9], [10, 11]]  # of 2 x 2 cells, in a grid of 3 x 4
LOST = {3: [1, 1, 1, 0], 2: [1, 1, 0, 0]}  # of so many cells, by each of these windows, first 3 and then 2
types = pytest.mark.parametrize("model_type", TYPES)
all_types = pytest.mark.parametrize("model_type", ALL_TYPES)


def features(model: nn.Module, grids: list[Grid], seed: int = 0, **flags: Any) -> Any:
    return model.model.get_image_features(patches(grids, seed), torch.tensor(grids), return_dict=True, **flags)


def frames(model_type: str) -> int:
    """Most frames of one entry: the stock code of GLM-4V hands them on one by one."""
    return 1 if model_type == "glm4v" else 2


def deepstack(output: Any) -> list[Tensor]:
    layers = getattr(output, "deepstack_features", None) or []
    return [layer if isinstance(layer, Tensor) else torch.cat(list(layer)) for layer in layers]


def all_close(found: Any, expected: Any, by: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=by, rtol=by)


@all_types
@torch.no_grad()
def test_nothing_merged_is_the_stock_model(model_type: str) -> None:
    """``r=0`` goes through every hook; what was changed is given back."""
    model, grids = tiny_qwen(model_type=model_type), [GRID, (frames(model_type), 4, 4), (1, 2, 2)]
    flags = {"output_hidden_states": True}
    stock = features(model, grids, **flags)
    accelerate_mllm(model, ToMeConfig(r=0))
    found = features(model, grids, **flags)
    all_close(list(found.pooler_output), list(stock.pooler_output))
    all_close(deepstack(found), deepstack(stock))
    all_close(found.hidden_states, stock.hidden_states)
    all_close(found.last_hidden_state, stock.last_hidden_state)
    restore_mllm(model)
    again = features(model, grids, **flags)
    assert all(torch.equal(a, b) for a, b in zip(again.pooler_output, stock.pooler_output, strict=True))


class ByHand:
    """One image on its way through a stock tower, cell by cell and window by window."""

    def __init__(self, model: nn.Module, method: str) -> None:
        self.tower, self.method = model.model.visual, method
        seen: list[Any] = []
        hook = self.tower.blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args[0], kwargs["position_embeddings"])), with_kwargs=True
        )
        features(model, [GRID])
        hook.remove()
        ((self.hidden, tables),) = seen
        self.cos, self.sin = tables
        windowed = hasattr(self.tower, "fullatt_block_indexes")
        self.cells = [cell for window in WINDOWS for cell in window] if windowed else list(range(12))
        self.size = torch.ones(12)
        self.groups = [[cell] for cell in self.cells]
        self.taps: list[tuple[Tensor, list[list[int]]]] = []

    def layer(self, index: int, removed: int) -> None:
        block, full = self.tower.blocks[index], getattr(self.tower, "fullatt_block_indexes", [index])
        regions = [self.cells] if index in full else WINDOWS
        regions = [[place for place, cell in enumerate(self.cells) if cell in region] for region in regions]
        lost = [removed] if len(regions) == 1 else LOST[removed]
        keys, received, attended = self.attend(block, regions)
        hidden = self.hidden + attended
        src, dst, weights = [], [], []
        for region, count in zip(regions, lost, strict=True):
            if not count:
                continue
            if self.method == "tome":
                decision = reference.bipartite_matching(keys[region], count, keep_order=True)
            else:
                decision = reference.complete_graph_matching(keys[region], received[region], count, set())
                weights += reference.pair_weights(received[region], decision)
            src += [region[place] for place in decision.src]
            dst += [region[place] for place in decision.dst]
        order = sorted(range(len(src)), key=lambda pair: src[pair])
        kept = [place for place in range(len(self.cells)) if place not in src]
        decision = reference.Decision([src[pair] for pair in order], [dst[pair] for pair in order], kept)
        whole = hidden.reshape(len(self.cells), -1)
        if weights:
            whole, size = reference.ensemble_merge(whole, self.size, decision, [weights[pair] for pair in order])
        else:
            whole, size = reference.mean_merge(whole, self.size, decision)
        for source, target in zip(decision.src, decision.dst, strict=True):
            self.groups[target] += self.groups[source]
        self.groups, self.cells = [self.groups[place] for place in kept], [self.cells[place] for place in kept]
        self.size = torch.as_tensor(size, dtype=torch.float32)
        self.cos, self.sin = (table.reshape(-1, 4, 8)[kept].reshape(-1, 8) for table in (self.cos, self.sin))
        hidden = torch.as_tensor(whole, dtype=torch.float32).reshape(-1, hidden.shape[-1])
        self.hidden = hidden + block.mlp(block.norm2(hidden))
        taps = list(getattr(self.tower, "deepstack_visual_indexes", []))
        if index in taps:
            made = self.tower.deepstack_merger_list[taps.index(index)](self.hidden)
            self.taps.append((made, [list(group) for group in self.groups]))

    def attend(self, block: nn.Module, regions: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and importance of the cells, and what the attention adds."""
        count = len(self.hidden)
        query, key, value = block.attn.qkv(block.norm1(self.hidden)).view(count, 3, 4, 8).permute(1, 2, 0, 3)
        query, key = self.rotated(query), self.rotated(key)
        logits = query @ key.transpose(1, 2) * 8**-0.5 + self.size.log().repeat_interleave(4)
        window = torch.empty(len(self.cells))
        for number, region in enumerate(regions):
            window[region] = float(number)
        window = window.repeat_interleave(4)
        attention = logits.masked_fill(window[:, None] != window, -torch.inf).softmax(dim=-1)
        attended = block.attn.proj((attention @ value).transpose(0, 1).reshape(count, -1))
        received = attention.mean(dim=(0, 1)).view(-1, 4).sum(dim=1)
        return key.mean(dim=0).view(-1, 4, 8).mean(dim=1), received, attended

    def rotated(self, heads: Tensor) -> Tensor:
        turned = torch.cat([-heads[..., 4:], heads[..., :4]], dim=-1)
        return heads * self.cos + turned * self.sin

    def in_the_grid(self, values: Tensor) -> Tensor:
        return values[sorted(range(len(self.cells)), key=lambda place: self.cells[place])]

    def tapped(self, made: Tensor, groups: list[list[int]]) -> Tensor:
        """The mean of a tap over what its cells have become: every cell of the grid counts once."""
        of_cell = {cell: row for row, group in zip(made, groups, strict=True) for cell in group}
        return torch.stack([torch.stack([of_cell[cell] for cell in group]).mean(dim=0) for group in self.groups])


@pytest.mark.parametrize("method", ["tome", "crossget"])
@types
@torch.no_grad()
def test_a_slow_loop_over_the_layers(model_type: str, method: str) -> None:
    stock = tiny_qwen("eager", model_type)
    if hasattr(stock.model.visual, "fullatt_block_indexes"):  # windows in the first layer, or in both
        stock.model.visual.fullatt_block_indexes = [1] if method == "tome" else []
    expected = ByHand(stock, method)
    removals = [3, 4 if method == "tome" else 2]
    for layer, removed in enumerate(removals):
        expected.layer(layer, removed)
    model = tiny_qwen("eager", model_type)
    if hasattr(model.model.visual, "fullatt_block_indexes"):
        model.model.visual.fullatt_block_indexes = stock.model.visual.fullatt_block_indexes
    accelerate_mllm(model, method=method, r=removals)
    found = features(model, [GRID])
    all_close(found.pooler_output[0], expected.in_the_grid(stock.model.visual.merger(expected.hidden)))
    assert kept_cells(found)[0].tolist() == sorted(expected.cells)
    all_close(groups_of(found)[0].size, expected.in_the_grid(expected.size))
    taps = deepstack(found)
    assert len(taps) == len(expected.taps)
    for tap, (made, groups) in zip(taps, expected.taps, strict=True):
        all_close(tap, expected.in_the_grid(expected.tapped(made, groups)))


def test_what_windows_lose() -> None:
    assert allotted([4, 4, 2, 2], 3) == LOST[3]
    assert allotted([3, 3, 1, 2], 2) == LOST[2]
    assert allotted([16, 1, 1], 8) == [8, 0, 0]
    assert allotted([16, 1, 1], 9) is None
    draw = random.Random(0)
    for _ in range(200):
        counts = [draw.randint(1, 16) for _ in range(draw.randint(1, 9))]
        most = sum(count // 2 for count in counts)
        given = allotted(counts, draw.randint(0, most)) or [0] * len(counts)
        assert all(0 <= lost <= count // 2 for lost, count in zip(given, counts, strict=True))
        assert allotted(counts, most + 1) is None


@all_types
@torch.no_grad()
def test_random_sizes(model_type: str) -> None:
    """Every cell of every frame is in exactly one token, with all methods, dials, schedules; a frame alone gives what
    it gives among others."""
    draw = random.Random(model_type)
    model = tiny_qwen(model_type=model_type)
    for case in range(30):
        grids = [
            (draw.randint(1, frames(model_type)), 2 * draw.randint(1, 5), 2 * draw.randint(1, 5)) for _ in range(3)
        ]
        dial: dict[str, Any] = draw.choice(
            [
                {"keep_ratio": draw.uniform(0.05, 0.99)},
                {"visual_tokens": draw.randint(1, 20)},
                {"r": draw.randint(0, 5)},
            ]
        )
        if "r" not in dial:
            dial["schedule"] = draw.choice([None, "constant", "late"])
        accelerate_mllm(model, method=draw.choice(FIXED), **dial)
        with trace_merges(model) as trace, trace_merges(model, tower="cells") as cells:
            found = features(model, grids, case)
        lengths = [cells_of((1, *grid[1:])) for grid in grids for _ in range(grid[0])]
        counts = [handle_of(model).merging.schedule(length).features for length in lengths]
        assert [len(kept) for kept in kept_cells(found)] == counts
        assert [int(group.size.sum()) for group in groups_of(found)] == lengths
        assert all(torch.equal(kept, kept.unique()) for kept in kept_cells(found))
        for entry in [*trace, *cells]:
            assert torch.equal(entry.size.sum(dim=1), torch.full((len(entry.size),), float(entry.source.shape[1])))
            for source, size in zip(entry.source, entry.size, strict=True):
                assert torch.equal(source.bincount(minlength=len(size)), size.long())
        if case < 6:
            starts = [4 * sum(map(cells_of, grids[:index])) for index in range(3)]
            for index, grid in enumerate(grids):
                pixels = patches(grids, case)[starts[index] : starts[index] + 4 * cells_of(grid)]
                alone = model.model.get_image_features(pixels, torch.tensor([grid]), return_dict=True)
                all_close(alone.pooler_output[0], found.pooler_output[index], 1e-4)


@all_types
@torch.no_grad()
def test_a_selection_at_the_output_is_behind_the_merger(model_type: str) -> None:
    """``schedule="output"`` and published settings leave the tower as it is."""
    stock, model = tiny_qwen(model_type=model_type), tiny_qwen(model_type=model_type)
    whole = features(stock, [GRID])
    for config in (
        CrossGetConfig(keep_ratio=0.4, schedule="output"),
        CrossGetConfig.published(keep_ratio=0.4),
        ToMeConfig.published(visual_tokens=3),
    ):
        accelerate_mllm(model, config)
        assert handle_of(model).tower is None
        values, kept = merge_by_hand(model, whole.pooler_output[0], deepstack(whole))
        found = features(model, [GRID])
        assert kept_cells(found)[0].tolist() == kept
        all_close([found.pooler_output[0], *deepstack(found)], values)


@all_types
@torch.no_grad()
def test_pictures_of_what_merged(model_type: str) -> None:
    """Equal numbers in the grid are one feature, also with what is merged behind the merger."""
    model, grids = tiny_qwen(model_type=model_type), [GRID, GRID]
    inputs = {"pixel_values": patches(grids), "image_grid_thw": torch.tensor(grids)}
    for dial in ({"schedule": None}, {"schedule": "constant"}, {"schedule": "output"}):
        accelerate_mllm(model, CrossGetConfig(keep_ratio=0.4, **dial))
        groups, found = merged_groups(model, **inputs), features(model, grids)
        for row, kept, group in zip(groups, kept_cells(found), groups_of(found), strict=True):
            assert row[kept].tolist() == list(range(5))
            assert row.bincount().tolist() == group.size.long().tolist()
        assert tokens_per_layer(model, **inputs)[:, 0].tolist() == [12, 12]
    with pytest.raises(ValueError, match=r"images of \[4, 12\] tokens"):
        merged_groups(model, patches([GRID, (1, 4, 4)]), image_grid_thw=torch.tensor([GRID, (1, 4, 4)]))


@torch.no_grad()
def test_what_leaves_where() -> None:
    model = tiny_qwen()
    accelerate_mllm(model, ToMeConfig(keep_ratio=0.1))  # two layers of at most half each: the rest behind the merger
    tower, behind = handle_of(model).tower.schedule(100), handle_of(model).merging.schedule(100)
    assert tower.tokens == (100, 50, 25)
    assert behind.removals == tuple(steps(25, 10))
    accelerate_mllm(model, CrossGetConfig(keep_ratio=0.3, schedule="constant"))
    assert handle_of(model).tower.schedule(100).tokens[-1] == 30
    assert handle_of(model).merging.schedule(100).removals == ()
    accelerate_mllm(model, CrossGetConfig(r=7))
    assert handle_of(model).tower.schedule(100).tokens == (100, 93, 86)


@pytest.mark.parametrize("reentrant", [False, True])
@all_types
def test_checkpoints_give_the_same_gradients(model_type: str, reentrant: bool) -> None:
    """Of two forwards in front of one backward, whose layers run again when no row is under way."""
    model = tiny_qwen(model_type=model_type)
    accelerate_mllm(model, CrossGetConfig(keep_ratio=0.4, schedule="constant"))
    model.train()
    batches = [batch_from(GRIDS), alone(batch_from(GRIDS), 0)]
    expected = gradients(model, *batches)
    assert any("visual.blocks.0.attn.qkv" in name for name in expected)
    checkpoint_activations(model, reentrant)
    assert_same_gradients(gradients(model, *batches), expected)


@pytest.mark.parametrize(
    ("width", "layers", "heads", "inner", "most"), [(3584, 28, 28, 18944, 0.39), (2048, 36, 16, 11008, 0.45)]
)
def test_what_a_quarter_of_the_tokens_costs(width: int, layers: int, heads: int, inner: int, most: float) -> None:
    """Qwen2.5-VL-7B and 3B on 1,024 visual tokens: tower and prefill, even removals."""
    config = resolve("qwen2.5-vl-7b")
    text = config.text_config
    text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.intermediate_size = (
        width,
        layers,
        heads,
        inner,
    )
    text.num_key_value_heads = 4 if heads == 28 else 2
    costs = []
    for dial in ({"keep_ratio": 1.0}, {"keep_ratio": 0.25, "schedule": "constant"}, {"keep_ratio": 0.25}):
        flops = model_flops(config, method_class("crossget")(**dial))
        costs.append(flops.encoder + flops.prefill + flops.reducer)
    assert costs[1] <= most * costs[0]
    assert costs[1] < costs[2] < costs[0]
