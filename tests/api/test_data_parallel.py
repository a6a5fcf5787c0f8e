"""``nn.DataParallel``, which ``Trainer`` chooses by itself where one process sees several GPUs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers.families.cases import Case
from tests.helpers.matrix import CASES, learned, takes
from tests.helpers.methods import METHODS
from tests.helpers.tiny import prompt_batch, tiny_llava

SAYS = r"nn\.DataParallel.*DistributedDataParallel.*torchrun.*CUDA_VISIBLE_DEVICES"


def replica(model: nn.Module) -> nn.Module:
    """What ``torch.nn.parallel.replicate`` makes for a device: modules without registered parameters."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copy in copies.items():
        for name, child in module._modules.items():
            copy._modules[name] = None if child is None else copies[child]
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            copy._parameters.pop(name, None)
            copy._buffers.pop(name, None)
            copy.__dict__[name] = None if value is None else value.detach()
    return copies[model]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_replica_says_what_to_use_instead(case: Case) -> None:
    model = learned(case, next(method for method in METHODS if takes(case, method)))
    with pytest.raises(RuntimeError, match=SAYS):
        case.answers(replica(model), case.batch(model))


def test_the_model_without_its_head_too() -> None:
    case = next(case for case in CASES if case.name == "llava-clip")
    model = learned(case, "crossget")
    with pytest.raises(RuntimeError, match=SAYS):
        replica(model).model(**case.batch(model))


@torch.no_grad()
def test_the_untouched_model_runs_in_a_replica() -> None:
    """Else the tests above would show nothing."""
    model = tiny_llava()
    batch = prompt_batch(model, (2, 0, 1))
    expected = model(**batch).logits  # which installs what records hidden states; a replica has it from the original
    torch.testing.assert_close(replica(model)(**batch).logits, expected)
