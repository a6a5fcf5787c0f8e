"""What a second question costs, and that a stream of images stays within the cache's bound."""

import json
import mmap
from pathlib import Path

import pytest

from mllm_crossget.benchmark.reuse_timing import many_images
from mllm_crossget.cli import main
from mllm_crossget.hooks.ground.vision_cache import MEBIBYTE, VisionCache
from tests.helpers.tiny import tiny_llava


def test_the_command_times_both_questions(tmp_path):
    tiny_llava().save_pretrained(tmp_path / "model")
    path = tmp_path / "reuse.json"
    words = ["bench-reuse", "--geometry", str(tmp_path / "model"), "--keep_ratio", "0.5", "--text_tokens", "60"]
    assert main([*words, "--rounds", "3", "--images", "60", "--output", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["questions"]["equal_answers"]
    assert list(report["questions"]["seconds"]) == [f"{part}, {which} question" for part in ("encoder", "first token")
                                                    for which in ("first", "second")]  # fmt: skip
    assert report["method"]["keep_ratio"] == 0.5
    assert report["memory"]["encoded"] == 60


def test_images_stay_within_the_bound():
    """An image of 36 tokens of 128 float32 takes 18 KiB: a MiB holds 56 of them."""
    memory = many_images(120, 1, batch=40)
    assert memory["bound_bytes"] == MEBIBYTE
    assert memory["largest_bytes"] <= MEBIBYTE
    assert 50 <= memory["images_kept"] <= 56
    assert memory["encoded"] == 120


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="elsewhere only the peak is known")
def test_a_process_that_grows_shows(monkeypatch):
    kept, keep = [], VisionCache.keep

    def leaking(self, *args):
        # Fresh pages, as what an earlier test has freed would take in a tensor; and far more of them than is asked for
        # below, as the process may give back other memory meanwhile.
        kept.append(mmap.mmap(-1, 3 * MEBIBYTE))
        kept[-1].write(bytes(3 * MEBIBYTE))
        keep(self, *args)

    monkeypatch.setattr(VisionCache, "keep", leaking)
    memory = many_images(120, 1, batch=40)
    assert memory["resident_bytes_at_the_end"] - memory["resident_bytes_after_a_tenth"] > 60 * MEBIBYTE
