"""Everything that a user could notice of a model, to compare before and after."""

from __future__ import annotations

import torch
from torch import nn

from tests.helpers.tiny import prompt_batch

GREEDY = {"max_new_tokens": 4, "do_sample": False}


def fingerprint(model: nn.Module) -> dict:
    """Everything that a user could notice: outputs, generated tokens, state dict in order, classes, attributes."""
    batch = prompt_batch(model, (2, 0, 1))
    with torch.no_grad():
        logits = model(**batch).logits
    return {
        "logits": logits,
        "tokens": model.generate(**batch, **GREEDY),
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "classes": [type(module) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "config": model.config.to_dict(),
    }


def assert_identical(ours: dict, expected: dict, but: tuple[str, ...] = ()) -> None:
    assert torch.equal(ours["logits"], expected["logits"])
    assert torch.equal(ours["tokens"], expected["tokens"])
    assert list(ours["state"]) == list(expected["state"])
    assert all(torch.equal(value, ours["state"][name]) for name, value in expected["state"].items())
    for name in set(expected) - {"logits", "tokens", "state", *but}:
        assert ours[name] == expected[name], name
