"""Ceilings by formula: on a device that only computes they are ratios of FLOPs, on one that only reads, of bytes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from PIL import Image

from mllm_crossget import CrossGetConfig, cli
from mllm_crossget.benchmark.gain_ceilings import CeilingsOptions, ceilings
from mllm_crossget.costs.flops import model_flops
from mllm_crossget.costs.geometries.llava import resolve

NAME = "llava-1.5-7b"
METHOD = CrossGetConfig(keep_ratio=0.25)
ENDLESS = 1e30


def test_without_memory_it_is_the_ratio_of_flops() -> None:
    report = ceilings(resolve(NAME), METHOD, CeilingsOptions(NAME, new_tokens=[1, 9], gigabytes_per_second=ENDLESS))
    for column, length in enumerate(report["new_tokens"]):
        costs = [
            model_flops(resolve(NAME), kind, new_tokens=length) for kind in (CrossGetConfig(keep_ratio=1.0), METHOD)
        ]
        ratio = (costs[0].total - costs[0].reducer) / (costs[1].total - costs[1].reducer)
        assert [row[column] for row in report["speed_up"]] == pytest.approx([ratio] * 3)


def test_without_computing_it_is_the_ratio_of_bytes_read() -> None:
    report = ceilings(resolve(NAME), METHOD, CeilingsOptions(NAME, [2], [1, 11], teraflops=ENDLESS))
    language, tower = 6.74e9, 0.325e9  # parameters; the embeddings are read as well, as a bound they are 4 % of it
    cache = 2 * 32 * 4096  # numbers per token
    read = [tower + 11 * language + 10 * 2 * cache * (60 + visual + 11 / 2) for visual in (576, 144)]
    assert report["speed_up"][0][0] == 1.0
    assert report["speed_up"][0][1] == pytest.approx(read[0] / read[1], rel=1e-3)


def test_batches_gain_and_long_answers_do_not(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["ceilings", NAME, "--keep_ratio", "0.25", "--json", "--plot", str(tmp_path / "curve.png")]
    assert cli.main(words) == 0
    report = json.loads(capsys.readouterr().out)
    rows = report["speed_up"]
    assert all(left > right for row in rows for left, right in itertools.pairwise(row))
    assert all(few < many for small, large in itertools.pairwise(rows)
               for few, many in zip(small[1:], large[1:], strict=True))  # fmt: skip
    assert report["visual_tokens"] == {"before": 576, "after": 144}
    assert Image.open(tmp_path / "curve.png").width > 500


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["clip-vit-b-16"], "has no language model that answers"),
        ([NAME, "--teraflops", "0"], "teraflops must be above 0, got 0.0"),
        ([NAME, "--bytes_per_number", "3"], "bytes_per_number must be 2 or 4, got 3"),
        ([NAME, "--new_tokens", "0"], "new_tokens must be at least 1, got 0"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert cli.main(["ceilings", *words]) == 2
    assert message in capsys.readouterr().err
