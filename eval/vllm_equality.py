"""Does vLLM with the plug-in give the answers of transformers? Token by token, greedy, on small models.

    PYTHON eval/vllm_equality.py          # PYTHON: of an environment with vLLM, see `make vllm`
    PYTHON eval/vllm_equality.py --url http://localhost:8000/v1

Every arm is one engine. Those of other families than LLaVA have small models with random weights. It answers all
requests, then again from its prefix cache. ``eval/results/vllm.json`` has one entry per arm: equal answers of all, by
number of pictures; tokens of the prompts; and, as a control, how many answers stay equal if transformers leaves the
arm's ``size_bias`` or its positions out. The control shows what equality proves.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import torch
from chat_client import answers_over_http
from transformers import HfArgumentParser

from mllm_crossget import CrossGetConfig, ToMeConfig
from mllm_crossget.config import ReductionConfig
from mllm_crossget.embedded import WEIGHTS_FOLDER
from mllm_crossget.integrations.vllm.comparison import (
    ENGINES_ON_A_CPU,
    Answer,
    Request,
    answers_of_transformers,
    answers_of_vllm,
    embedded_requests,
    engine,
    equal,
    with_cross_tokens,
)
from mllm_crossget.integrations.vllm.random_models import random_model, random_requests

os.environ |= ENGINES_ON_A_CPU  # read when vLLM is imported, which the first engine does


@dataclass
class Options:
    """Options of the experiment."""

    one: int = field(default=140, metadata={"help": "questions about one picture"})
    two: int = field(default=50, metadata={"help": "questions about two pictures"})
    none: int = field(default=10, metadata={"help": "questions without a picture"})
    prompts: int = field(default=50, metadata={"help": "prompts for models with random weights"})
    url: str = field(default="", metadata={"help": "of a server with keep_ratio=0.25 to ask instead of own engines"})
    arms: list[str] = field(default_factory=list, metadata={"help": "names of arms; all by default"})
    output: str = field(default="eval/results/vllm.json", metadata={"help": "file of the results"})


@dataclass
class Arm:
    """One engine.

    Attributes:
        config: the reduction.
        engine: further options of the engine.
        cross: standard deviation of random learned cross tokens; 0 for none.
        controlled: whether the controls are computed too.
        random: model type of a model with random weights, which gets prompts of one to four pictures of several sizes;
            "": the embedded model.
    """

    config: ReductionConfig
    engine: dict[str, Any] = field(default_factory=dict)
    cross: float = 0.0
    controlled: bool = False
    random: str = ""


_CUT = {"max_num_batched_tokens": 64, "block_size": 32}  # pictures of 72 tokens are cut in the prefill
_SERVED = "default 0.25, over HTTP"
_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
ARMS = {
    "untouched": Arm(CrossGetConfig(keep_ratio=1.0)),
    "default 0.5": Arm(CrossGetConfig(keep_ratio=0.5)),
    "default 0.25": Arm(CrossGetConfig(keep_ratio=0.25), controlled=True),
    "default 0.125": Arm(CrossGetConfig(keep_ratio=0.125)),
    "default 0.5, pictures cut": Arm(CrossGetConfig(keep_ratio=0.5), _CUT),
    "default 0.5, blocks of 32": Arm(CrossGetConfig(keep_ratio=0.5), {"block_size": 32}),
    "default 0.25, compiled": Arm(CrossGetConfig(keep_ratio=0.25), {"enforce_eager": False}),
    "default 0.25, two ranks": Arm(CrossGetConfig(keep_ratio=0.25), _RANKS),
    "default 0.25, cross tokens": Arm(CrossGetConfig(keep_ratio=0.25), {"block_size": 32}, 0.7, controlled=True),
    "without sizes 0.25": Arm(CrossGetConfig(keep_ratio=0.25, size_bias=False)),
    _SERVED: Arm(CrossGetConfig(keep_ratio=0.25)),
    "contiguous 0.25": Arm(CrossGetConfig(keep_ratio=0.25, positions="contiguous")),
    "published 0.5": Arm(CrossGetConfig.published(keep_ratio=0.5)),
    "published 0.25": Arm(CrossGetConfig.published(keep_ratio=0.25)),
    "published 0.25, cross tokens": Arm(CrossGetConfig.published(keep_ratio=0.25), cross=0.7),
    "tome 0.5": Arm(ToMeConfig(keep_ratio=0.5)),
    "tome 0.25": Arm(ToMeConfig(keep_ratio=0.25)),
}
_NAMES = {"internvl": "InternVL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}
_SMALL_CUT = {"max_num_batched_tokens": 48, "block_size": 32}
for _type, _name in _NAMES.items():
    ARMS |= {
        f"{_name}, untouched": Arm(CrossGetConfig(keep_ratio=1.0), random=_type),
        f"{_name}, default 0.5": Arm(CrossGetConfig(keep_ratio=0.5), random=_type),
        f"{_name}, default 0.25": Arm(CrossGetConfig(keep_ratio=0.25), controlled=True, random=_type),
        f"{_name}, default 0.25, pictures cut": Arm(CrossGetConfig(keep_ratio=0.25), _SMALL_CUT, random=_type),
        f"{_name}, without sizes 0.25": Arm(CrossGetConfig(keep_ratio=0.25, size_bias=False), random=_type),
        f"{_name}, tome 0.25": Arm(ToMeConfig(keep_ratio=0.25), random=_type),
    }


def main() -> None:
    """Run the arms, and write down each when it is done."""
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    path = Path(options.output)
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in [_SERVED] if options.url else options.arms or [name for name in ARMS if name != _SERVED]:
        arm = ARMS[name]
        requests = requests_for(arm, options)
        results[name] = asked(arm, requests, options.url) if options.url else measured(arm, requests)
        results[name]["settings"] = arm.config.to_dict()
        print(name, json.dumps(results[name]), flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


def requests_for(arm: Arm, options: Options) -> list[Request]:
    """Of the embedded model, or prompts of one to four pictures of several sizes."""
    if arm.random:
        return random_requests(arm.random, [1 + number % 4 for number in range(options.prompts)])
    return embedded_requests(options.one, options.two, options.none)


def measured(arm: Arm, requests: list[Request]) -> dict[str, Any]:
    """One arm: transformers, then vLLM twice, then the controls."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = with_cross_tokens(Path(scratch), arm.config, arm.cross) if arm.cross else WEIGHTS_FOLDER
        folder = random_model(Path(scratch), arm.random) if arm.random else folder
        wanted = answers_of_transformers(requests, arm.config, folder)
        limits = {"limit_mm_per_prompt": {"image": 4}, "max_model_len": 1024} if arm.random else {}
        with engine(arm.config, folder, **{**limits, **arm.engine}) as llm:
            first, again = answers_of_vllm(llm, requests), answers_of_vllm(llm, requests)
        controls = {}
        if arm.controlled:
            for change in ({"size_bias": False}, {"positions": "contiguous"})[: 1 if arm.random else 2]:
                other = answers_of_transformers(requests, replace(arm.config, **change), folder)
                controls["equal with " + json.dumps(change)] = equal(wanted, other)
        if arm.cross and arm.controlled:
            controls["equal without cross tokens"] = equal(wanted, answers_of_transformers(requests, arm.config))
    return {**counted(requests, wanted, first, again), "engine": asdict(arm)["engine"], "controls": controls}


def asked(arm: Arm, requests: list[Request], url: str) -> dict[str, Any]:
    """A running server, eight requests at a time, twice."""
    wanted = answers_of_transformers(requests, arm.config)
    return counted(requests, wanted, *(answers_over_http(url, requests) for _ in range(2)))


def counted(requests: list[Request], wanted: list[Answer], first: list[Answer], again: list[Answer]) -> dict[str, Any]:
    """What is reported of an arm's answers."""
    return {
        "requests": len(requests),
        "equal": equal(wanted, first),
        "equal again": equal(wanted, again),
        "equal by pictures": {str(n): _share(requests, wanted, first, n) for n in _numbers(requests)},
        "prompts of equal length": sum(a.prompt_tokens == b.prompt_tokens for a, b in zip(wanted, first, strict=True)),
        "mean tokens of prompts with one picture": _mean(requests, first),
    }


def _numbers(requests: list[Request]) -> list[int]:
    return sorted({len(one.images) for one in requests})


def _share(requests: list[Request], left: list[Answer], right: list[Answer], pictures: int) -> str:
    chosen = [i for i, one in enumerate(requests) if len(one.images) == pictures]
    return f"{equal([left[i] for i in chosen], [right[i] for i in chosen])} of {len(chosen)}"


def _mean(requests: list[Request], answers: list[Answer]) -> float:
    lengths = [answer.prompt_tokens for one, answer in zip(requests, answers, strict=True) if len(one.images) == 1]
    return round(sum(lengths) / max(1, len(lengths)), 1)


if __name__ == "__main__":
    sys.exit(main())
