"""The language model and its layers, where a method drops visual tokens inside them.

A layer gets the arguments of the whole prompt, because the model's loop makes them once. Every layer behind a stage
takes the rows and columns that are left, so that tokens keep their positions. The output is put back to full length.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.hooks.ground.arguments import positional_names
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.kv_cache import CACHE, cache_from, cache_in, with_named_cache
from mllm_crossget.hooks.language.key_bias import KEYWORD, LISTENER, attention_modules, hook_language_attention
from mllm_crossget.hooks.language.staged_call import Picture, StagedCall, Stages, forget_stages, stages_on
from mllm_crossget.hooks.language.staged_columns import Columns, all_columns, joined
from mllm_crossget.methods.capabilities import InLanguageModel

PICTURE = "crossget_picture"
"""Keyword by which the model that reads the prompt tells its language model which columns are visual tokens."""
_CALL = "crossget_call"
_LAYER = "_mllm_crossget_layer"
_PLAN = "_mllm_crossget_plan"
_ARGUMENTS = {"hidden_states", "attention_mask", "position_ids", CACHE, "use_cache", "position_embeddings"}
_FULL = "full_attention"


class _HeardError(Exception):
    """Ends a run of a layer that was made to hear its attention."""


def hook_stages(
    journal: Journal, language_model: Any, method: InLanguageModel, at: tuple[int, ...], size_bias: bool
) -> None:
    """Drop visual tokens in front of the layers ``at``; every change is written into ``journal``."""
    for number, layer in enumerate(language_model.layers):
        hook_language_attention(journal, layer)
        journal.set_attribute(layer, _LAYER, number)
        journal.swap_class(layer, StagedLayer)
    journal.set_attribute(language_model, _PLAN, (method, at, size_bias))
    journal.swap_class(language_model, StagedLanguageModel)


def stages_problem(language_model: Any, method: InLanguageModel) -> str | None:
    """Why tokens cannot leave inside a language model, or None."""
    config, layers = language_model.config, getattr(language_model, "layers", None)
    if layers is None:
        return f"{type(language_model).__name__} has no list of layers"
    name = type(layers[0]).__name__
    kinds = set(getattr(config, "layer_types", None) or [_FULL]) - {_FULL}
    window = getattr(config, "sliding_window", None)
    if kinds or (window and getattr(config, "layer_types", None) is None):
        what = f"layers of {', '.join(sorted(kinds))}" if kinds else f"sliding_window={window}"
        return (
            f"{type(language_model).__name__} has {what}: they hold a window or a state and not all columns, and a "
            "stage must know which columns a layer holds"
        )
    if getattr(config, "_attn_implementation", None) == "flex_attention":
        return "flex attention's masks cannot be cut to the tokens that are left; use sdpa, eager or flash attention"
    if not all(any(attention_modules(layer)) for layer in layers):
        return f"the attention in {name} does not go through transformers' attention interface"
    if "deepstack_visual_embeds" in positional_names(type(language_model)):
        return "its first layers add features of the image to their tokens, so that none of them may leave there"
    missing = sorted(_ARGUMENTS - {*positional_names(type(layers[0])), CACHE, "use_cache", "position_ids"})
    if missing:
        return f"{name} takes no {', '.join(missing)}"
    if getattr(config, "num_kv_shared_layers", 0):
        return "its last layers read the keys of earlier ones"
    if method.needs.normed and not isinstance(getattr(language_model, "norm", None), nn.Module):
        return f"the method reads states behind the last norm, and {type(language_model).__name__} has none"
    return None


class StagedLanguageModel(nn.Module):
    """Mixin for the language model (decoder)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original. ``crossget_picture``: which of the new columns are visual tokens."""
        if args:
            kwargs.update(zip(positional_names(type(self)), args, strict=False))
        kwargs = with_named_cache(kwargs)
        picture: Picture | None = kwargs.pop(PICTURE, None)
        cache = cache_in(kwargs)
        past = 0 if cache is None else int(cache.get_seq_length())
        held = stages_on(cache)
        if held is not None and not past:  # the cache was emptied: its columns were another prompt's
            forget_stages(cache)
            held = None
        if picture is None and held is None:
            return super().forward(**kwargs)
        refuse_cache(cache)
        plan: tuple[InLanguageModel, tuple[int, ...], bool] = self.__dict__[_PLAN]
        method, at, size_bias = plan
        if kwargs.get("inputs_embeds") is None:
            kwargs["inputs_embeds"] = self.get_input_embeddings()(kwargs.pop("input_ids"))  # type: ignore[operator]
        embeddings: Tensor = kwargs["inputs_embeds"]
        before = _cached_columns(held, past, len(at), embeddings)
        call = StagedCall(method, at, past, before, picture, embeddings, size_bias, getattr(self, "norm", None))
        output = super().forward(**kwargs, **{_CALL: call})
        if picture is not None:
            left = call.queries(len(at) - 1).to(output.last_hidden_state.device)
            output.last_hidden_state = left.restored(output.last_hidden_state, embeddings.shape[1])
        call.keep_on(cache_from(output))
        return output


class StagedLayer(nn.Module):
    """Mixin for a decoder layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, on the columns that are left; at a stage it chooses them first."""
        call: StagedCall | None = kwargs.pop(_CALL, None)
        if call is None:
            return super().forward(*args, **kwargs)
        kwargs.update(zip(positional_names(type(self)), args, strict=False))
        layer, run = self.__dict__[_LAYER], super().forward
        takes_matrix = not _is_flash(self)
        if layer in call.at:
            probe = partial(_probe, run, call, layer, kwargs, takes_matrix)
            kwargs["hidden_states"] = call.enter(layer, kwargs["hidden_states"], probe)
        return run(**call.arguments(layer, kwargs, takes_matrix))


def _probe(run: Any, call: StagedCall, layer: int, kwargs: dict[str, Any], takes_matrix: bool, listener: Any) -> None:
    """Run a layer on what enters the stage in front of it, up to its attention, without writing into the cache."""
    stage = call.stage_of(layer)
    arguments = call.arguments(layer, kwargs, takes_matrix, new=stage - 1)
    cache = arguments.pop(CACHE, None)

    def listen(query: Tensor, key: Tensor, mask: Any, scaling: float, bias: Tensor | None) -> None:
        if call.past:
            key = torch.cat([cache.layers[layer].keys.to(key), key], dim=2)
        listener(query, key, mask, scaling, bias)
        raise _HeardError

    arguments.pop(KEYWORD, None)
    with suppress(_HeardError):
        run(**{**arguments, LISTENER: listen})


def _is_flash(layer: nn.Module) -> bool:
    """Whether a layer's attention takes no mask for every query."""
    attention: Any = next(attention_modules(layer))
    implementation = vars(attention.__dict__["_mllm_crossget_language_config"])["_attn_implementation_internal"] or ""
    return "flash" in implementation


def refuse_cache(cache: Any) -> None:
    """Raise ``ValueError`` for a KV cache that cannot hold different numbers of columns in its layers."""
    layers = getattr(cache, "layers", [])
    kinds = {type(layer).__name__ for layer in layers} - {"DynamicLayer"}
    if cache is not None and (kinds or not hasattr(cache, "layers")):
        raise ValueError(
            f"{type(cache).__name__} ({', '.join(sorted(kinds)) or 'no layers'}): tokens that leave inside the "
            "language model give its layers caches of different lengths, which a DynamicCache alone can hold; leave "
            "cache_implementation out"
        )


def _cached_columns(held: Stages | None, past: int, stages: int, embeddings: Tensor) -> list[Columns]:
    """The columns of a cache behind every stage: what is known of them, and those that were added since."""
    rows, device = len(embeddings), embeddings.device
    if held is None:
        return [all_columns(rows, past, device) for _ in range(stages)]
    if past < held.length:
        raise ValueError(
            f"the KV cache was cut to {past} columns, but tokens left inside the language model among its first "
            f"{held.length}, so that its layers do not agree on the rest; start with an empty cache"
        )
    added = all_columns(rows, past - held.length, device).shifted(held.length)
    return [joined(one.to(device).for_rows(rows), added) for one in held.columns]
