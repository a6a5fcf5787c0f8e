"""``bench-serve``: which servers it asks, the prompts it makes, and how it adds runs up. Without vLLM and a server;
``tests/integrations/test_vllm.py`` has a run against one."""

from __future__ import annotations

import base64
import io
import json

import pytest
from PIL import Image

from mllm_crossget import cli
from mllm_crossget.benchmark.serving_load import BenchServeOptions, checked_address, counts_of, make_prompts
from mllm_crossget.benchmark.serving_report import Run, draw_load, load_table, summary

HERE = "here=http://localhost:8000"
PLAIN = {"untouched": 12, "reduced": 10}


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "127.8.8.8:1", "[::1]:8000"])
def test_loopback_addresses_are_asked(host: str) -> None:
    assert checked_address(f"http://{host}/v1/") == f"http://{host}"


@pytest.mark.parametrize("host", ["example.org", "10.0.0.1:8000", "0.0.0.0:8000", "localhost.example.org", "[::2]"])
def test_other_machines_are_asked_only_with_the_option(host: str) -> None:
    with pytest.raises(ValueError, match="--allow_remote"):
        BenchServeOptions([f"there=http://{host}"])
    assert BenchServeOptions([f"there=http://{host}"], allow_remote=True).addresses() == {"there": f"http://{host}"}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["http://localhost:8000"], "NAME=ADDRESS"),
        ([HERE, HERE], "each name once"),
        (["here=localhost:8000"], "is no address of a server"),
        ([HERE, "--concurrency", "65"], "from 1 to 64"),
        ([HERE, "--sizes", "big"], "WIDTHxHEIGHT"),
        ([HERE, "--shared", "2"], "shared must be in"),
        ([HERE, "--requests", "100000"], "give fewer"),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(capsys, words: list[str], reason: str) -> None:
    assert cli.main(["bench-serve", *words]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def pictures(prompts) -> list[str]:
    return [part["image_url"]["url"] for prompt in prompts for part in prompt["content"] if part["type"] == "image_url"]


def test_prompts_have_pictures_of_all_sizes_and_only_shared_ones_come_again() -> None:
    options = BenchServeOptions([HERE], requests=40, shared=0.5, pictures=2, sizes=["40x24", "24x48"])
    first, other = pictures(make_prompts(options, 0, 8)), pictures(make_prompts(options, 1, 8))
    assert first == pictures(make_prompts(options, 0, 8))
    assert not set(first) & set(other)
    decoded = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size for url in first]
    assert sorted(set(decoded)) == [(24, 48), (40, 24)]
    assert len(first) == 80
    again = sum(first.count(url) > 1 for url in first)
    assert 20 < again < 60
    assert len({url for url in first if first.count(url) > 1}) == 2
    alone = pictures(make_prompts(BenchServeOptions([HERE], requests=9, shared=0.0, sizes=["16x16"]), 0, 1))
    assert len(set(alone)) == 9


def test_metrics_give_tokens_of_a_prompt_and_blocks_of_a_request() -> None:
    before, after = {"prompt tokens": 100.0, "prompts": 4.0}, {"prompt tokens": 700.0, "prompts": 10.0}
    samples = [{"running": 2.0, "used": 0.25, "blocks": 41.0}, {"running": 3.0, "used": 0.5, "blocks": 41.0}, {}]
    samples.append({"running": 0.0, "used": 0.0, "blocks": 41.0})
    assert counts_of(before, after, samples) == {"prompt_tokens": 100.0, "blocks": 6.0, "block_size": None}
    assert counts_of({}, {}, []) == {"prompt_tokens": None, "blocks": None, "block_size": None}


def run_of(server: str, level: int, number: int, first: list[float], tokens: float | None = None) -> Run:
    return Run(server, level, number, 2.0, len(first), 0, 8 * len(first), first, [0.01, 0.03], tokens, tokens and 3.0)


def test_the_summary_is_over_all_rounds(tmp_path) -> None:
    runs = [run_of("untouched", 4, 0, [0.1, 0.3], 588.0), run_of("reduced", 4, 0, [0.1, 0.2], 154.0)]
    runs += [run_of("untouched", 4, 1, [0.5, 0.7, 0.9], 588.0), run_of("untouched", 1, 0, [], None)]
    report = {"summary": summary(runs, PLAIN, 2)}
    alone, untouched, reduced = report["summary"]
    assert (alone["concurrency"], alone["first token, seconds"], alone["tokens of a picture"]) == (1, None, None)
    assert (untouched["rounds"], untouched["completed"]) == (2, 5)
    assert untouched["first token, seconds"]["p50"] == 0.5
    assert untouched["new tokens per second"] == 10.0
    assert untouched["requests per second"]["mean"] == 1.25
    assert (untouched["tokens of a picture"], reduced["tokens of a picture"]) == (288.0, 72.0)
    assert reduced["first token, seconds"]["p95"] == pytest.approx(0.195)
    assert load_table(report).row_count == 3
    draw_load(report, str(tmp_path / "load.png"))
    assert (tmp_path / "load.png").stat().st_size > 1000
    assert json.dumps(report)


def test_without_vllm_it_says_what_to_install(capsys, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["bench-serve", HERE]) == 2
    assert "vLLM is not installed here" in capsys.readouterr().err
