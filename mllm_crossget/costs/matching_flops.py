"""FLOPs of matchings, measured on tensors without data."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mllm_crossget.methods.method import Method
from mllm_crossget.methods.signals import AskedText, NextLayer, Signals
from mllm_crossget.schedule import Schedule


def matching_flops(
    method: Method,
    tokens: int,
    width: int,
    removed: int,
    ends: int = 0,
    at_output: bool = False,
    features_width: int | None = None,
) -> int:
    """FLOPs of one matching of ``tokens`` tokens with keys of ``width`` channels; ``ends`` of them are protected: class
    token and cross token, which stand first and last.

    Measured by running the method on tensors without data, so that a new method is counted without a formula of its
    own. CrossGET compares all pairs of unprotected tokens (2T² for each channel). With counts per image it compares all
    tokens, with two more channels that carry the protection. ``at_output`` it compares all pairs, and once more the
    removed tokens with the kept ones. ToMe compares even with odd tokens (half of T² / 2), random dropping none.
    """
    keys = torch.empty(1, tokens, width, device="meta")
    importance, attention, salience, middle = (
        torch.empty(1, tokens, device="meta") if wanted else None
        for wanted in (
            method.needs_importance,
            method.needs_class_attention,
            method.needs_salience,
            method.needs_middle,
        )
    )
    protected: Any = tuple(range(ends))
    if method.is_dynamic:  # dead tokens lie elsewhere in every image
        protected = torch.zeros(1, tokens, dtype=torch.bool, device="meta")
    with FlopCounterMode(display=False) as counter:
        whole = torch.empty(1, tokens, features_width or width, device="meta")
        features = whole if method.needs_features else None
        signals = Signals(keys, importance, protected, False, features, attention, salience, middle)
        if method.needs_next_layer:
            signals.following = NextLayer(torch.empty(1, tokens, device="meta"), whole)
        if method.needs_text:
            signals.text = AskedText(whole[:, :1], torch.empty(1, 1, dtype=torch.bool, device="meta"))
        (method.match_at_output if at_output else method.match)(signals, removed)
    return int(counter.get_total_flops())


def merging_flops(width: int, schedule: Schedule, method: Method) -> int:
    """Behind the projector: the matching of features and, where asked for, their attention to one another, one head."""
    total = 0
    for step, (tokens, removed) in enumerate(zip(schedule.tokens, schedule.removals, strict=False)):
        total += matching_flops(method, tokens, width, removed, at_output=step == schedule.output)
        total += 2 * tokens * tokens * (width + 1) if method.needs_importance else 0
    return total
