"""Settings of the training tests: one thread, and one warning that PEFT provokes; a folder for the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from mllm_crossget.embedded.architecture import build_model, build_processor
from tests.helpers.versions import TRAINS

_HERE = Path(__file__).parent
collect_ignore_glob = [] if TRAINS else ["test_*.py"]  # the package itself refuses to be imported there


def pytest_report_header() -> str:
    return "" if TRAINS else "tests/training are left out: training needs transformers 5.23 or newer"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE in item.path.parents:  # PEFT 0.21 reads a property that transformers 5.23 has renamed
            item.add_marker(pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with an untrained model, eight samples (one of them broken) and a YAML file."""
    folder = tmp_path_factory.mktemp("train")
    build_model().save_pretrained(folder / "model")
    build_processor().save_pretrained(folder / "model")
    rows = []
    for index in range(8):
        Image.new("RGB", (96, 96), (30 * index, 90, 90)).save(folder / f"{index}.png")
        turns = [{"from": "human", "value": "<image>\nHow many digits are there?"}, {"from": "gpt", "value": "3"}]
        rows.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    (folder / "3.png").write_bytes(b"no picture")
    (folder / "data.json").write_text(json.dumps(rows))
    settings = {
        "model": str(folder / "model"),
        "train_data": str(folder / "data.json"),
        "keep_ratio": 0.25,
        "lora_r": 2,
        "lora_alpha": 4,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": "1e-3",  # what YAML 1.1 makes of 1e-3 without a dot
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder
