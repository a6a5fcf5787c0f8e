"""Random sequences of what users do with a model, beside a twin that never was accelerated.

After every step the model computes what a copy of the twin computes that is accelerated in one go with the settings and
learned tokens the model has by then; once it is restored it is the twin, bit for bit.
"""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from mllm_crossget import (
    accelerate_mllm,
    accelerated,
    calibrate,
    load_crossget,
    restore_mllm,
    reuse_vision,
    save_crossget,
    trace_merges,
)
from mllm_crossget.api import unreduced
from mllm_crossget.hooks.ground.state import handle_of, live_cross_tokens
from tests.helpers import gradients
from tests.helpers.exploring import SEED, explore, in_parts
from tests.helpers.llava import labels_of
from tests.helpers.tiny import pixels, prompt_batch, tiny_llava

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own look-up
SETTINGS: list[dict[str, Any]] = [
    {"method": "crossget", "keep_ratio": 0.5},
    {"method": "crossget", "visual_tokens": 5, "positions": "contiguous"},
    {"method": "crossget", "keep_ratio": 0.6, "dynamic": True},
    {"method": "madtp", "keep_ratio": 0.5, "alignment_tokens": 4, "alignment_width": 8},
    {"method": "tome", "r": 2},
    {"method": "random", "keep_ratio": 0.4, "seed": 3},
    {"method": "crossget", "keep_ratio": 1.0},
]
GREEDY = {"max_new_tokens": 2, "do_sample": False}


class Pair:
    """A model and its twin."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.choose, self.folder = random.Random(seed), folder
        self.model, self.twin = (tiny_llava(layers=3, text_layers=2, attention="sdpa") for _ in range(2))
        self.saved: dict[str, Any] | None = None

    @property
    def settings(self) -> Any:
        handle = handle_of(self.model)
        return None if handle is None else handle.method

    def both(self, act: Callable[[nn.Module], Any]) -> None:
        for one in (self.model, self.twin):
            act(one)

    @torch.no_grad()
    def logits(self, model: nn.Module) -> torch.Tensor:
        batch = prompt_batch(model, (1, 0, 2))
        return model(**batch).logits.clone()

    def expected(self) -> torch.Tensor:
        """Of a copy of the twin, accelerated in one go."""
        fresh = copy.deepcopy(self.twin)
        if self.settings is not None:
            accelerate_mllm(fresh, self.settings)
            values = {place: module.state_dict() for place, module in live_cross_tokens(self.model).items()}
            for place, module in live_cross_tokens(fresh).items():
                module.load_state_dict(values[place])
        return self.logits(fresh)

    def check(self) -> None:
        with torch.random.fork_rng():
            assert torch.equal(self.logits(self.model).nan_to_num(), self.expected().nan_to_num())

    def check_restored(self) -> None:
        restore_mllm(self.model)
        self.both(self.logits)  # leaves marks of transformers' own
        ours, theirs = self.model.state_dict(), self.twin.state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
        for one, other in zip(self.model.modules(), self.twin.modules(), strict=True):
            assert type(one) is type(other)
            assert sorted(vars(one)) == sorted(vars(other))
        assert torch.equal(self.logits(self.model).nan_to_num(), self.logits(self.twin).nan_to_num())


def accelerate(pair: Pair) -> None:
    accelerate_mllm(pair.model, **pair.choose.choice(SETTINGS))
    calibrate_it(pair)


def calibrate_it(pair: Pair) -> None:
    if pair.settings is not None and pair.settings.is_dynamic:
        calibrate(pair.model, pixels(pair.model, 6, seed=pair.choose.randrange(9)))


def learn(pair: Pair) -> None:
    """Other learned tokens, as an optimiser would leave them."""
    with torch.no_grad():
        for module in live_cross_tokens(pair.model).values() if pair.settings is not None else ():
            for parameter in module.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape))


def change_attention(pair: Pair) -> None:
    kind = pair.choose.choice(["sdpa", "eager"])
    pair.both(lambda model: model.set_attn_implementation(kind))


def change_type(pair: Pair) -> None:
    kind = pair.choose.choice([torch.float32, torch.bfloat16, torch.float64])
    before = {place: module.state_dict() for place, module in learned_of(pair).items()}
    pair.both(lambda model: model.to(kind))
    assert {place: set(module.state_dict()) for place, module in learned_of(pair).items()} == {
        place: set(values) for place, values in before.items()
    }


def learned_of(pair: Pair) -> dict[str, nn.Module]:
    return live_cross_tokens(pair.model) if pair.settings is not None else {}


def train_or_not(pair: Pair) -> None:
    mode = pair.choose.choice([True, False])
    pair.both(lambda model: model.train(mode))


def save(pair: Pair) -> None:
    if pair.settings is not None:
        save_crossget(pair.model, pair.folder)
        pair.saved = {"settings": pair.settings}


def load(pair: Pair) -> None:
    if pair.saved is not None:
        load_crossget(pair.model, pair.folder)
        assert pair.settings == pair.saved["settings"]


def add_and_merge(pair: Pair) -> None:
    """A LoRA on the language model, learned a little, merged and gone again."""

    def tune(model: nn.Module) -> nn.Module:
        config = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)
        torch.manual_seed(5)
        tuned = get_peft_model(model, config)
        pair.logits(tuned.get_base_model())
        merged = tuned.merge_and_unload()
        assert merged is model
        model.requires_grad_(True)
        return merged

    with warnings.catch_warnings():  # of the order, which is what is tried here
        warnings.simplefilter("ignore")
        pair.both(tune)


def copy_deeply(pair: Pair) -> None:
    pair.model, pair.twin = copy.deepcopy(pair.model), copy.deepcopy(pair.twin)


def pickle_it(pair: Pair) -> None:
    """An untouched model cannot be pickled once it was asked for hidden states; a reduced one can."""
    if type(pair.model) is not type(pair.twin):
        pair.model = pickle.loads(pickle.dumps(pair.model))


def checkpoint_activations(pair: Pair) -> None:
    pair.both(lambda model: gradients.checkpoint_activations(model, reentrant=False))


def reuse(pair: Pair) -> None:
    if pair.settings is not None:
        reuse_vision(pair.model, pair.choose.choice([True, False]))


def trace(pair: Pair) -> None:
    if pair.settings is not None and not pair.settings.is_identity:
        with trace_merges(pair.model) as layers:
            pair.logits(pair.model)
        assert layers


def generate(pair: Pair) -> None:
    batch = prompt_batch(pair.model, (1, 0))
    pair.both(lambda model: model.generate(**batch, **GREEDY))


def backward(pair: Pair) -> None:
    """A step of training: gradients, and the same update of the weights that both have."""
    if next(pair.twin.parameters()).dtype is not torch.float32:
        return
    batch = prompt_batch(pair.model, (1, 0), padding_side="right")
    mode = pair.model.training
    output = pair.model.train()(**batch, labels=labels_of(pair.model, batch), use_cache=False)
    (output.loss + getattr(output, "alignment_loss", 0.0)).backward()
    pair.model.zero_grad(set_to_none=True)
    pair.model.train(mode)
    with torch.no_grad():
        pair.both(lambda model: model.model.language_model.norm.weight.mul_(1.01))


def resize(pair: Pair) -> None:
    size = pair.choose.choice([100, 104, 108])
    pair.both(lambda model: model.resize_token_embeddings(size, mean_resizing=False))
    for name, value in pair.twin.state_dict().items():  # new rows are random
        if name in pair.model.state_dict():
            pair.model.state_dict()[name].copy_(value)


def compile_tower(pair: Pair) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(pair.model, backend="eager")
    restore_mllm(compiled)
    assert pair.settings is None
    torch._dynamo.reset()


def within(pair: Pair) -> None:
    with accelerated(pair.model, method="tome", keep_ratio=0.3):
        pair.logits(pair.model)


def stock_for_a_while(pair: Pair) -> None:
    if pair.settings is not None:
        with unreduced(pair.model):
            assert torch.equal(pair.logits(pair.model).nan_to_num(), pair.logits(pair.twin).nan_to_num())


def refuse(pair: Pair) -> None:
    with pytest.raises((ValueError, TypeError)):
        accelerate_mllm(pair.model, **pair.choose.choice([{"keep_ratio": 2}, {"r": [1]}, {"visual_tokens": 999}]))


def restore(pair: Pair) -> None:
    restore_mllm(pair.model)


STEPS = [
    accelerate, accelerate, accelerate, calibrate_it, learn, learn, change_attention, change_type, train_or_not, save,
    load, add_and_merge, copy_deeply, pickle_it, checkpoint_activations, reuse, trace, generate, backward, resize,
    compile_tower, within, stock_for_a_while, refuse, restore,
]  # fmt: skip


@in_parts(short=6, long=1000)
def test_a_sequence_leaves_what_its_last_settings_mean(
    examples: int, part: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def check(steps: list[int], seed: int) -> None:
        torch.manual_seed(seed)
        pair = Pair(seed, tmp_path_factory.mktemp("sequence"))
        for step in steps:
            STEPS[step](pair)
            pair.check()
        pair.check_restored()

    steps = st.lists(st.integers(0, len(STEPS) - 1), min_size=3, max_size=10)
    explore(check, examples, SEED + part, steps=steps, seed=st.integers(0, 10**6))
