"""What tests run in processes of their own (``tests.helpers.processes``); each function is the whole program."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def slow_training(folder: str, pause: float) -> None:
    """Twelve steps that go on from the folder's last checkpoint; prints each, and sleeps behind the fifth and later.

    LoRA dropout draws random numbers: a resume that restored no generator state would be seen.
    """
    from transformers import TrainerCallback

    from mllm_crossget.training import last_complete_checkpoint
    from tests.helpers.toy import ToySamples, toy_model, toy_trainer

    class Slow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            print(state.global_step, flush=True)
            time.sleep(pause if state.global_step >= 5 else 0)

    trainer = toy_trainer(folder, toy_model(dropout=0.1), ToySamples(32, 4), max_steps=12, save_strategy="steps",
        save_steps=4, save_total_limit=2, gradient_accumulation_steps=2, train_sampling_strategy="group_by_length",
        enable_jit_checkpoint=True)  # fmt: skip
    trainer.add_callback(Slow())
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    print("end", trainer.state.global_step, flush=True)


def distributed_training(*words: str) -> None:
    """One rank of ``tests.helpers.train_distributed``."""
    from tests.helpers.train_distributed import main

    main(*words)


def pickled_answer(model_file: str, answer_file: str) -> None:
    """A pickled model gives the logits that are stored beside it; nothing of the library was imported before."""
    import torch

    if any(name.startswith("mllm_crossget") for name in sys.modules):
        raise RuntimeError("the library is there already")
    with torch.no_grad():
        model, (batch, logits) = (torch.load(path, weights_only=False) for path in (model_file, answer_file))
        if not torch.equal(model(**batch).logits, logits):
            raise RuntimeError("other logits")


def pytest_in(folder: str, words: list[str]) -> None:
    """pytest on a copy of the project, whose modules are imported and not those of this one."""
    import pytest

    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "mllm_crossget")]:
        del sys.modules[name]
    sys.path.insert(0, str(Path(folder)))
    os.chdir(folder)
    sys.exit(int(pytest.main([*words, "-n", "0", "-p", "no:cacheprovider"])))
