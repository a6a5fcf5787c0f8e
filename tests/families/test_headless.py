"""The model without its head, called by itself (``model.model(**inputs)``), as TRL and reward heads do."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mllm_crossget import restore_mllm
from mllm_crossget.families.family import families, module_at
from mllm_crossget.hooks.ground.state import handle_of
from tests.helpers.families.cases import Batch, Case
from tests.helpers.matrix import CASES, covering, is_first, learned, takes
from tests.helpers.methods import METHODS
from tests.helpers.products import rest_unless

# Llama 4 has no model without its head.
SHRUNK = [case for case in CASES if families()[case.model_type].modalities and case.name != "llama4"]
PAIRS = [
    pytest.param(
        method, case, id=f"{case.name}-{method}", marks=rest_unless(method in covering(case, 1 + is_first(case)))
    )
    for case in SHRUNK
    for method in METHODS
    if takes(case, method)
]


def headless(model: nn.Module) -> Any:
    return module_at(model, handle_of(model).family.features_owner)


def head(model: Any, hidden: Tensor) -> Tensor:
    """The stock head, with the soft cap that some families put behind it (PaliGemma in newer transformers)."""
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    capped = "softcapping" in inspect.getsource(inspect.unwrap(type(model).forward))
    return torch.tanh(logits / cap) * cap if cap is not None and capped else logits


def real(batch: Batch) -> Tensor:
    return batch["attention_mask"] != 0


def test_there_are_such_families() -> None:
    assert len(SHRUNK) >= 15


@pytest.mark.parametrize(("method", "case"), PAIRS)
@torch.no_grad()
def test_its_states_through_the_stock_head_are_the_models_logits(method: str, case: Case) -> None:
    model = learned(case, method)
    batch = case.batch(model)
    logits = model(**batch).logits
    hidden = headless(model)(**batch).last_hidden_state
    assert hidden.shape[:2] == batch["input_ids"].shape
    kept = (hidden != 0).any(dim=-1)
    placeholders = real(batch).sum() - kept[real(batch)].sum()
    assert placeholders > 0, "no column was removed"
    assert torch.equal(logits[~kept], torch.zeros_like(logits[~kept]))
    torch.testing.assert_close(head(model, hidden)[kept], logits[kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=rest_unless(is_first(case))) for case in SHRUNK]
)
@torch.no_grad()
def test_tuples_positions_of_arguments_and_caches(case: Case) -> None:
    """As the call with the head: a tuple where it is asked for, and a cache that either call goes on with."""
    model = learned(case, "crossget" if takes(case, "crossget") else next(m for m in METHODS if takes(case, m)))
    batch = case.batch(model)
    hidden = headless(model)(**batch, use_cache=False).last_hidden_state
    as_tuple = headless(model)(**batch, use_cache=False, return_dict=False)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], hidden, atol=1e-5, rtol=1e-5)
    made = headless(model)(**batch, use_cache=True)
    whole = model(**batch, use_cache=True)
    word = batch["input_ids"][:, :1] * 0 + 5
    mask = torch.cat([batch["attention_mask"], torch.ones_like(word)], dim=1)
    further = {"input_ids": word, "attention_mask": mask}
    after = headless(model)(**further, past_key_values=made["cache" if "cache" in made else "past_key_values"])
    expected = model(**further, past_key_values=whole["cache" if "cache" in whole else "past_key_values"])
    torch.testing.assert_close(head(model, after.last_hidden_state), expected.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=rest_unless(is_first(case))) for case in SHRUNK]
)
@torch.no_grad()
def test_restored_it_takes_full_prompts_again(case: Case) -> None:
    model = case.build("sdpa")
    batch = case.batch(model)
    inner = module_at(model, families()[case.model_type].features_owner)
    before, kind, names = inner(**batch).last_hidden_state, type(inner), set(vars(inner))
    method = next(name for name in METHODS if takes(case, name))
    accelerated = learned(Case(**{**vars(case), "build": lambda attention: model}), method)
    assert not torch.equal(inner(**batch).last_hidden_state, before)
    restore_mllm(accelerated)
    assert type(inner) is kind
    assert set(vars(inner)) == names
    assert torch.equal(inner(**batch).last_hidden_state, before)
