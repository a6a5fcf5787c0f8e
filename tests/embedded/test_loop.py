"""The training loop of the small models: a stopped run goes on as if it had not stopped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mllm_crossget.embedded.loop import Phase, Run


def new_run(folder, **options) -> Run:
    torch.manual_seed(0)
    return Run(nn.Linear(3, 3), nn.Linear(3, 1), (Phase(3, 1.0, 0.5), Phase(4, 0.8, 0.01)), folder, 1e-2, **options)


def lesson(run: Run):
    def loss(step: int):
        shown = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        wrong = (run.heads(run.model(shown)) - shown.sum(1, keepdim=True)).square().mean()
        return wrong, {"wrong": wrong.item()}

    return loss


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = new_run(tmp_path / "whole")
    assert list(whole.train(lesson(whole), save_every=2)) == [1, 2, 3, 4, 5, 6, 7]
    stopped = new_run(tmp_path / "stopped")
    for step in stopped.train(lesson(stopped), save_every=2):
        if step == 5:
            break
    resumed = new_run(tmp_path / "stopped")
    resumed.load()
    assert resumed.step == 4
    assert list(resumed.train(lesson(resumed), save_every=2)) == [5, 6, 7]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert resumed.seconds > 0


def test_every_phase_ramps_up_and_falls(tmp_path):
    run = new_run(tmp_path, ramp=2)
    rates = []
    for run.step in range(8):
        rates.append(run.learning_rate())
    assert rates[0] == pytest.approx(0.5e-2)
    assert rates[3] == pytest.approx(0.8e-2 / 2)
    assert rates[1] > rates[2]
    assert rates[4] > rates[5] > rates[6] > rates[7] == 0


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    run = new_run(tmp_path)
    with pytest.raises(FloatingPointError, match="step 0"):
        run.take_step(lambda _: (run.heads(run.model(torch.full((1, 3), torch.inf))).sum(), {}))
