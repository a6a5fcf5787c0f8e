"""vLLM with the plug-in gives the answers of transformers, token by token. Skipped where vLLM is not installed.

``make vllm`` makes an environment and runs this file. All engines run in this process, on a CPU, one after the other.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make vllm", allow_module_level=True)

from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoProcessor, SiglipVisionConfig

from mllm_crossget import CrossGetConfig, ToMeConfig, cli
from mllm_crossget.config import ReductionConfig
from mllm_crossget.embedded import WEIGHTS_FOLDER, load_embedded
from mllm_crossget.integrations.vllm.comparison import (
    ENGINES_ON_A_CPU,
    Request,
    answers_of_transformers,
    answers_of_vllm,
    embedded_requests,
    engine,
    equal,
    served_counts,
    with_cross_tokens,
)
from mllm_crossget.integrations.vllm.random_models import random_model, random_requests
from mllm_crossget.integrations.vllm.settings import kept_of
from tests.helpers.tiny import tiny_llava

os.environ |= ENGINES_ON_A_CPU  # read when vLLM is imported, which the first engine does
pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]
REQUESTS = embedded_requests(one=12, two=6, none=2)
CUT = {"max_num_batched_tokens": 64, "block_size": 32}
"""72 tokens of a picture are cut in the prefill; prompts fill whole blocks, which the prefix cache can keep."""


def compared(
    config: ReductionConfig | None, folder: Path = WEIGHTS_FOLDER, requests: list[Request] = REQUESTS, **options
):
    """Answers of transformers, of vLLM, and of vLLM once more."""
    wanted = answers_of_transformers(requests, config, folder)
    with engine(config, folder, **options) as llm:
        return wanted, answers_of_vllm(llm, requests), answers_of_vllm(llm, requests)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (CrossGetConfig(keep_ratio=1.0), 144),
        (CrossGetConfig(keep_ratio=0.5), 72),
        (CrossGetConfig(keep_ratio=0.125), 18),
        (CrossGetConfig.published(keep_ratio=0.5), 72),
        (ToMeConfig(keep_ratio=0.25), 36),
    ],
    ids=["untouched", "default 0.5", "default 0.125", "published 0.5", "tome 0.25"],
)
def test_answers_are_those_of_transformers(config: ReductionConfig, tokens: int) -> None:
    wanted, first, again = compared(config)
    assert first == wanted
    assert again == wanted
    words = answers_of_vllm_lengths(REQUESTS)
    assert [one.prompt_tokens for one in first] == [
        count + tokens * len(request.images) for count, request in zip(words, REQUESTS, strict=True)
    ]


def answers_of_vllm_lengths(requests: list[Request]) -> list[int]:
    """Tokens of the prompts without their images."""
    _, processor = load_embedded()
    return [len(processor.tokenizer(one.text.replace("<image>", ""))["input_ids"]) for one in requests]


def test_sizes_and_positions_decide_answers_so_that_equality_says_something() -> None:
    config = CrossGetConfig(keep_ratio=0.25)
    wanted, first, _ = compared(config)
    assert first == wanted
    for change in ({"size_bias": False}, {"positions": "contiguous"}):
        assert answers_of_transformers(REQUESTS, replace(config, **change)) != wanted


def test_pictures_cut_by_the_prefill_and_prompts_of_the_prefix_cache() -> None:
    wanted = answers_of_transformers(REQUESTS, CrossGetConfig(keep_ratio=0.5))
    with engine(CrossGetConfig(keep_ratio=0.5), **CUT, disable_log_stats=False) as llm:
        for request, words in list(zip(REQUESTS, answers_of_vllm_lengths(REQUESTS), strict=True))[10:14]:
            tokens = words + 72 * len(request.images)
            assert served_counts(llm, request) == (tokens, math.ceil(tokens / CUT["block_size"]))
        assert answers_of_vllm(llm, REQUESTS) == wanted
        assert answers_of_vllm(llm, REQUESTS) == wanted
        output = llm.generate({"prompt": REQUESTS[0].text, "multi_modal_data": {"image": list(REQUESTS[0].images)}})
        assert output[0].num_cached_tokens >= 64


def test_a_saved_folder_is_served_as_it_is_with_its_cross_tokens(tmp_path: Path) -> None:
    config = CrossGetConfig(keep_ratio=0.25)
    folder = with_cross_tokens(tmp_path, config, spread=0.7)
    wanted, first, again = compared(None, folder, block_size=32)
    assert first == wanted
    assert again == wanted
    assert answers_of_transformers(REQUESTS, config) != wanted  # without them


def test_a_siglip_tower(tmp_path: Path) -> None:
    shutil.copytree(WEIGHTS_FOLDER, tmp_path, dirs_exist_ok=True)
    model, _ = load_embedded()
    config = model.config
    siglip = tiny_llava(tower="siglip", layers=4, image_size=96, patch_size=8, width=128)
    config.vision_config, config.vision_feature_select_strategy = siglip.config.vision_config, "full"
    assert isinstance(config.vision_config, SiglipVisionConfig)
    config.vision_feature_layer = -1
    other = type(model)(config)
    other.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "vision_tower" not in name}, strict=False
    )
    other.model.vision_tower.load_state_dict(siglip.model.vision_tower.state_dict())
    with torch.no_grad():
        other.model.multi_modal_projector.linear_2.weight.mul_(3)
    other.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    settings |= {"vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    wanted, first, _ = compared(CrossGetConfig(keep_ratio=0.25), tmp_path)
    assert first == wanted
    assert len({one.tokens for one in wanted}) > 3


@pytest.mark.parametrize("model_type", ["internvl", "qwen2_5_vl", "qwen3_vl"])
def test_pictures_of_any_size(model_type: str, tmp_path: Path) -> None:
    """Random weights; one, two and three pictures of different sizes, and none."""
    folder, config = random_model(tmp_path, model_type), CrossGetConfig(keep_ratio=0.25)
    requests = random_requests(model_type, [1, 2, 3, 0] * 5)
    wanted = answers_of_transformers(requests, config, folder, new_tokens=10)
    limits = {"limit_mm_per_prompt": {"image": 3}, "max_num_batched_tokens": 48, "block_size": 32}
    with engine(config, folder, **limits, disable_log_stats=False) as llm:
        counts = [served_counts(llm, request) for request in requests[:4]]
        assert answers_of_vllm(llm, requests, new_tokens=10) == wanted
        assert answers_of_vllm(llm, requests, new_tokens=10) == wanted
    kept, processor = kept_of(config, AutoConfig.from_pretrained(folder)), AutoProcessor.from_pretrained(folder)
    for request, counted in zip(requests, counts, strict=False):
        inputs = processor(images=list(request.images) or None, text=[request.text])
        placeholders = inputs["input_ids"][0].count(processor.image_token_id)
        grids = inputs.get("image_grid_thw", [])  # InternVL: tiles of one size
        images = [int(height * width) // 4 for _, height, width in grids] or [placeholders]
        tokens = len(inputs["input_ids"][0]) - placeholders + sum(map(kept, images))
        assert counted == (tokens, math.ceil(tokens / 32))
    assert (
        equal(wanted, answers_of_transformers(requests, replace(config, size_bias=False), folder, new_tokens=10)) < 15
    )
    assert len({answer.tokens for answer in wanted}) > 15


def test_a_model_without_settings_is_vllms_own(tmp_path: Path) -> None:
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    shutil.copytree(WEIGHTS_FOLDER, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")  # vLLM's own class knows the tower's older names alone
    named = {
        re.sub("vision_tower.(?!vision_model)", "vision_tower.vision_model.", name): weights[name] for name in weights
    }
    save_file(named, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with engine(None, tmp_path) as llm:
        kinds = llm.apply_model(type)
        answers = answers_of_vllm(llm, REQUESTS)
    assert kinds == [LlavaForConditionalGeneration]
    assert answers == answers_of_transformers(REQUESTS, CrossGetConfig(keep_ratio=1.0))


def test_the_front_end_refuses_before_a_worker_starts() -> None:
    with pytest.raises(ValueError, match="content of an image"), engine(CrossGetConfig(keep_ratio=0.5, dynamic=True)):
        pass


class StandIn(BaseHTTPRequestHandler):
    """What a server answers: 5 tokens for the words and 7 for a picture, as text and in its metrics."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        asked = self.server.asked
        metrics = f"vllm:request_prompt_tokens_sum {sum(5 + 7 * len(one) for one in asked)}\n"
        metrics += f"vllm:request_prompt_tokens_count {len(asked)}\nvllm:num_requests_running 2\n"
        metrics += 'vllm:kv_cache_usage_perc 0.5\nvllm:cache_config_info{block_size="16",num_gpu_blocks="13"} 1\n'
        self.answer(metrics if self.path == "/metrics" else json.dumps({"data": [{"id": "m", "root": "m"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][0]["content"]
        pictures = (
            [] if isinstance(content, str) else [one["image_url"]["url"] for one in content if "image_url" in one]
        )
        self.server.asked.append(pictures)
        usage = {"prompt_tokens": 5 + 7 * len(pictures), "completion_tokens": 3}
        if not body.get("stream"):
            return self.answer(json.dumps({"usage": usage}))
        if self.server.broken and pictures:
            return self.send_error(500)
        time.sleep(0.05)  # long enough for a reading of the metrics
        parts = [{"choices": [{"delta": {"content": "a"}}]}] * 3 + [{"choices": [], "usage": usage}]
        self.answer("".join(f"data: {json.dumps(part)}\n\n" for part in parts) + "data: [DONE]\n\n")

    def answer(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


def test_bench_serve_asks_all_servers_the_same_with_vllms_client(tmp_path: Path) -> None:
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), StandIn) for _ in range(2)]
    for server in servers:
        server.asked, server.broken = [], False
        Thread(target=server.serve_forever, daemon=True).start()
    names = [f"{name}=http://127.0.0.1:{server.server_port}" for name, server in zip("ab", servers, strict=True)]
    words = ["--requests", "6", "--concurrency", "1", "3", "--sizes", "32x32", "48x24", "--pictures", "2"]
    words += ["--output", str(tmp_path / "load.json"), "--rounds", "2", "--new_tokens", "3"]
    assert cli.main(["bench-serve", *names, *words]) == 0
    report = json.loads((tmp_path / "load.json").read_text())
    assert [one["server"] for one in report["runs"]] == ["a", "b", "a", "b", "b", "a", "b", "a"]
    assert sorted(servers[0].asked) == sorted(servers[1].asked)
    for entry in report["summary"]:
        assert (entry["completed"], entry["failed"], entry["tokens of a picture"]) == (12, 0, 7.0)
        assert entry["blocks of a request"] == pytest.approx(3.0)
        assert entry["first token, seconds"]["p50"] > 0.04
    servers[1].broken = True
    assert cli.main(["bench-serve", *names, *words]) == 1
    failed = {(one["server"], one["failed"]) for one in json.loads((tmp_path / "load.json").read_text())["runs"]}
    assert failed == {("a", 0), ("b", 6)}
    for server in servers:
        server.shutdown()
        server.server_close()
