"""Checks whether a folder's earlier run is the one that is started again, and whether it is finished.

Resuming with other settings would mix two runs; training a finished run again would replace its result.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from mllm_crossget.config import CONFIG_NAME, ReductionConfig
from mllm_crossget.methods.method import Method
from mllm_crossget.training.options import TrainerSettings, TrainOptions, output_folder

OPTIONS_NAME = "train_options.json"
_STATE_NAME = "trainer_state.json"
# Options that may change when a run is resumed. Of paths only the last name is compared, as data and models move.
_FREE = ("eval_data", "image_folder", "on_bad_sample", "calibration_images", "calibration_every")
_PATHS = ("model", "train_data")
_MOVED_BY_TRAINING = ("threshold", "text_threshold", "temperature")
_WAYS_OUT = "give another output_dir, or --resume_from_checkpoint no to start anew in this one"


def write_options(options: TrainOptions, output_dir: str | Path) -> None:
    """Write the options beside the checkpoints, for ``check_same_options``."""
    text = json.dumps(dataclasses.asdict(options), indent=2, sort_keys=True) + "\n"
    (Path(output_dir) / OPTIONS_NAME).write_text(text)


def check_same_options(options: TrainOptions, output_dir: str | Path) -> None:
    """Raise ``ValueError`` that names the options in which a folder's run differs, if the folder has its options."""
    file = Path(output_dir) / OPTIONS_NAME
    if not file.is_file():
        return
    try:
        saved = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); remove it, or {_WAYS_OUT}") from error
    now = dataclasses.asdict(options)
    differing = {
        name: (saved[name], value)
        for name, value in now.items()
        if name in saved and name not in _FREE and _plain(name, saved[name]) != _plain(name, value)
    }
    _refuse(differing, output_dir)


def check_same_method(method: Method, folder: str | Path) -> None:
    """Raise ``ValueError`` that names the settings in which the reduction of a checkpoint or result differs."""
    if not (Path(folder) / CONFIG_NAME).is_file():
        return
    saved, now = ReductionConfig.from_pretrained(folder).to_dict(), method.to_dict()
    names = sorted({*saved, *now} - set(_MOVED_BY_TRAINING))
    if not method.moving_settings and saved["method"] == now["method"]:
        names += [name for name in _MOVED_BY_TRAINING[2:] if name in now]
    _refuse({name: (saved.get(name), now.get(name)) for name in names if saved.get(name) != now.get(name)}, folder)


def finished_step(args: TrainerSettings, steps: int) -> int | None:
    """The step at which the folder's earlier run ended and wrote its result, if that is at least ``steps``."""
    step = last_step(output_folder(args))
    return step if step is not None and step >= steps else None


def last_step(folder: str | Path) -> int | None:
    """The step of a checkpoint, or of a folder with the result of a finished run; None for neither."""
    try:
        return int(json.loads((Path(folder) / _STATE_NAME).read_text())["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def planned_steps(args: TrainerSettings, batches: int) -> int:
    """Number of optimiser steps of a whole run, whose epochs have ``batches`` batches per process."""
    if args.max_steps > 0:
        return args.max_steps
    per_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * per_epoch)


def _plain(name: str, value: Any) -> Any:
    return Path(value).name if name in _PATHS and isinstance(value, str) else value


def _refuse(differing: dict[str, tuple[Any, Any]], folder: str | Path) -> None:
    if differing:
        differences = ", ".join(f"{name}={now!r} (it was {before!r})" for name, (before, now) in differing.items())
        raise ValueError(f"{folder} holds a run with other settings: {differences}; {_WAYS_OUT}")
