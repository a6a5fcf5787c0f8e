"""Hidden states and attention maps that transformers returns from a reduced model have the documented lengths, in every
family with every method of fixed counts (``mllm_crossget.families.family`` says which lengths).

Every part of a model (the whole of it, its vision tower, a Q-Former, BLIP's text models) is called as the model calls
it, and asked for its states; a model with the same weights that was not accelerated says what else has to be there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mllm_crossget.families.family import families, module_at
from mllm_crossget.hooks.ground.state import Handle, handle_of
from mllm_crossget.hooks.projector.features import features_of
from mllm_crossget.schedule import MergeGeometry
from tests.helpers.families.case_packed import PER_SIDE, WHOLE, runs
from tests.helpers.families.cases import Batch, Case, all_cases
from tests.helpers.matrix import covering, is_first
from tests.helpers.methods import FIXED, prepare
from tests.helpers.products import rest_unless
from tests.helpers.tiny import randomise_cross_tokens

CROSS_ATTENDING = ("qformer", "text_encoder", "text_decoder.bert")
TOWER, TEXT = "vision tower", "text_model_output"
PAIRS = [(case, method) for case in all_cases() for method in FIXED if method not in case.skip_methods]
Shapes = dict[str, list[tuple[int, ...] | None] | None]


def shapes(output: Any, name: str = "") -> Shapes:
    """Shapes of all tensors of an output by their names, lists of one tensor per layer as lists; None for None."""
    if name == "rope_deltas":  # transformers before 5.23 makes none where positions are given
        return {}
    if output is None or isinstance(output, Tensor):
        return {name: None if output is None else [tuple(output.shape)]}
    entries: Any = ()
    if isinstance(output, (list, tuple)):
        if not any(isinstance(entry, (list, tuple)) for entry in output):
            return {name: [None if entry is None else tuple(entry.shape) for entry in output]}
        entries = enumerate(output)
    elif hasattr(output, "items"):  # else a cache
        entries = output.items()
    parts = [shapes(part, f"{name}.{key}".strip(".")) for key, part in entries]
    return {key: found for part in parts for key, found in part.items()}


def returned(case: Case, model: nn.Module, batch: Batch) -> dict[str, Shapes]:
    """What every part of the model returns, by its path; "" is the whole model."""
    tower = families()[case.model_type].tower
    names = ["", *([tower] if tower else []), *(path for path in CROSS_ATTENDING if has(model, path))]
    calls: dict[str, tuple[tuple, dict]] = {}
    with ExitStack() as stack:
        for name in names:
            hook = module_at(model, name).register_forward_hook(
                lambda _, args, kwargs, output, name=name: calls.update({name: (args, kwargs)}), with_kwargs=True
            )
            stack.callback(hook.remove)
        case.answers(model, batch)
    flags = {"output_hidden_states": True, "output_attentions": True, "return_dict": True}
    return {
        name: shapes(module_at(model, name)(*args, **{**kwargs, **flags})) for name, (args, kwargs) in calls.items()
    }


def has(model: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in model.named_modules())


@functools.cache
@torch.no_grad()
def untouched(case_name: str, attention: str) -> tuple[dict[str, Shapes], dict[str, list[int]]]:
    """The same of a model that is not accelerated, and the features of its images."""
    case = next(case for case, _ in PAIRS if case.name == case_name)
    model = case.build(attention)
    batch = case.batch(model)
    return returned(case, model, batch), features_per_image(case, model, batch)


def features_per_image(case: Case, model: nn.Module, batch: Batch) -> dict[str, list[int]]:
    """Features of every image (row, tile: whatever the model returns one entry for) that can become fewer, by the name
    of their token."""
    family, found = families()[case.model_type], {}
    for modality in family.modalities:
        if modality.pixels in batch:
            owner = module_at(model, family.features_owner)
            arguments = {name: batch[name] for name in modality.arguments if name in batch}
            output = getattr(owner, modality.encode)(batch[modality.pixels], **arguments, return_dict=True)
            features = features_of(output)
            features = output.last_hidden_state if features is None else features  # an untouched Llama 4
            counts = [image.shape[:-1].numel() for image in features]
            frames = batch[modality.pixels].shape[1]
            if case.model_type == "llava_onevision" and modality.name == "video" and counts[0] % frames == 0:
                counts = [count + 1 for count in counts]  # the newline: added by the caller before transformers 5.23
            found[modality.token] = counts
    return found


def compact_length(model: nn.Module, batch: Batch, before: dict[str, list[int]], after: dict[str, list[int]]) -> int:
    """Columns of the prompt that the language model reads: of the row with the most real tokens that are left."""
    lengths = []
    images = {name: iter(zip(before[name], after[name], strict=True)) for name in before}
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        length = int(mask.sum())
        for name, entries in images.items():
            placeholders = int((ids[mask != 0] == getattr(model.config, name)).sum())
            while placeholders:
                n, k = next(entries)
                placeholders, length = placeholders - n, length - n + k
            assert placeholders == 0
        lengths.append(length)
    return max(lengths)


def squares(like: list[tuple[int, ...]] | None, counts: tuple[int, ...]) -> list[tuple[int, ...]] | None:
    """Attention maps (B, heads, T, T) of so many tokens; nothing where the untouched model has nothing."""
    return [(*shape[:2], count, count) for shape, count in zip(like, counts, strict=True)] if like else like


def of_tower(
    stock: Shapes, tokens: tuple[int, ...], prefix: str = "", whole: tuple[int, int] | None = None
) -> Iterator[tuple[str, Any]]:
    """States and maps of a tower (a text tower too) with these counts in front of its layers and behind them; ``whole``
    is what the last states of the untouched tower begin with: images, tokens."""
    for name, like in stock.items():
        kind = name.removeprefix(prefix) if name.startswith(prefix) else ""
        if kind == "hidden_states" and like:
            pairs = zip(like, tokens, strict=True)  # transformers 5.24 hands on only the states that are read
            yield name, [shape and (shape[0], count, shape[2]) for shape, count in pairs]
        elif kind == "attentions":
            yield name, squares(like, tokens[:-1])
        elif kind in ("last_hidden_state", "image_embeds") and like[0][:2] == whole:
            yield name, [(like[0][0], tokens[-1], like[0][2])]


def as_before(handle: Handle) -> bool:
    """Whether a tower's states have the lengths that they had: it is as it was, or its tokens are copied back."""
    geometry = handle.geometry
    return isinstance(geometry, MergeGeometry) or geometry.block > 1


def of_towers_read(handle: Handle, stock: Shapes) -> Iterator[tuple[str, Any]]:
    """``image_outputs`` and ``video_outputs`` (from transformers 5.24): what the tower gave, also where it is asked
    for its states. Tokens that were copied back to a whole grid are as many as before."""
    if as_before(handle) or handle.geometry.cells is not None:
        return
    own = {f"{name}_outputs.": tower.schedule.tokens for name, tower in handle.modality_towers.items()}
    for prefix in ("image_outputs.", "video_outputs."):
        tokens = own.get(prefix, handle.schedule.tokens)
        if f"{prefix}last_hidden_state" in stock:
            whole = stock[f"{prefix}last_hidden_state"][0][:2]
            yield from of_tower(stock, tokens, prefix, whole)
        if "concatenated" in handle.family.features and stock.get(f"{prefix}hidden_states"):  # groups of the last layer
            read = handle.geometry.read
            aligned = [tokens[read] if 0 < layer < read else count for layer, count in enumerate(tokens)]
            states = dict(of_tower(stock, tuple(aligned), prefix))
            yield f"{prefix}hidden_states", states[f"{prefix}hidden_states"]


def expected(
    case: Case, model: nn.Module, batch: Batch, stock: dict[str, Shapes], before: dict[str, list[int]]
) -> dict[str, Shapes]:
    """The documented lengths: those of the untouched model, apart from what follows."""
    family, handle = families()[case.model_type], handle_of(model)
    found = {name: dict(part) for name, part in stock.items()}
    tokens = handle.schedule.tokens
    if case.model_type in {**PER_SIDE, **WHOLE} and stock[family.tower].get(
        "attentions"
    ):  # states of all patches, maps run by run
        heads = stock[family.tower]["attentions"][0][1]
        found[family.tower]["attentions"] = [
            (images, heads, count, count)
            for images, patches in runs(case.model_type)
            for count in handle.tower.schedule(patches).tokens[:-1]
        ]
    elif case.model_type not in {**PER_SIDE, **WHOLE} and not as_before(handle) and family.tower is not None:
        whole = stock[family.tower]["last_hidden_state"][0][:2]
        found[family.tower].update(of_tower(stock[family.tower], tokens, whole=whole))
        for path in filter(lambda path: path in stock, CROSS_ATTENDING):
            found[path] = {name: crossing(like, handle) for name, like in stock[path].items()}
        found[""].update(of_towers_read(handle, stock[""]))
        for prefix in ("vision_outputs.", "vision_model_output."):
            found[""].update(of_tower(stock[""], tokens, prefix, whole))
        found[""].update(
            (name, crossing(like, handle)) for name, like in stock[""].items() if name.startswith("qformer_outputs.")
        )
        if family.language_model is None or family.model_type == "blip":  # the states of the whole are the tower's
            found[""].update(of_tower(stock[""], tokens, whole=whole))
    if handle.text_tower is not None:
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        counts = handle.text_tower.schedule(int(real.sum(dim=1).max())).tokens
        of_text(found, stock, family.text_tower.path, family.text_tower.reader, counts)
        prefix = "" if family.tower is None else f"{TEXT}."
        if family.tower is None or any(name.startswith(prefix) for name in stock[""]):
            found[""].update(of_tower(stock[""], counts, prefix))
            if not family.text_tower.appends:
                end_in_columns(found[""], stock[""], prefix)
    if family.modalities:
        after = features_per_image(case, model, batch)
        length = compact_length(model, batch, before, after)
        assert length < batch["input_ids"].shape[1]
        states = stock[""]["hidden_states"]
        found[""]["hidden_states"] = [(len(batch["input_ids"]), length, shape[2]) for shape in states]
        found[""]["attentions"] = squares(stock[""]["attentions"], (length,) * len(stock[""]["attentions"] or ()))
        found[""].update(features_read(stock[""], before, after))
    return found


def end_in_columns(found: Shapes, stock: Shapes, prefix: str = "") -> None:
    """The last entry of BLIP's hidden states is ``last_hidden_state``, as in the stock model."""
    name = f"{prefix}hidden_states"
    if stock.get(name):
        found[name] = [*found[name][:-1], stock[name][-1]]


def of_text(found: dict[str, Shapes], stock: dict[str, Shapes], encoder: str, reader: str, counts: tuple) -> None:
    """BLIP's text encoder, whose queries to the image are the tokens that are left, and the decoder that reads it."""
    if encoder in stock:
        found[encoder].update(of_tower(stock[encoder], counts))
        end_in_columns(found[encoder], stock[encoder])
        crossed = found[encoder]["cross_attentions"]
        found[encoder]["cross_attentions"] = [
            (*shape[:2], left, shape[3]) for shape, left in zip(crossed, counts[1:], strict=True)
        ]
    if reader and reader in stock:
        found[reader]["cross_attentions"] = [(*shape[:3], counts[-1]) for shape in stock[reader]["cross_attentions"]]


def crossing(like: list[tuple[int, ...]] | None, handle: Handle) -> list[tuple[int, ...]] | None:
    """Attention maps whose keys are the tower's tokens: (B, heads, queries, tokens)."""
    whole, left = handle.schedule.placeholders, handle.schedule.tokens[-1]
    return like and [(*shape[:-1], left) if len(shape) == 4 and shape[-1] == whole else shape for shape in like]


def features_read(
    stock: Shapes, before: dict[str, list[int]], after: dict[str, list[int]]
) -> Iterator[tuple[str, Any]]:
    """``image_hidden_states`` and the features in ``image_outputs``: as many vectors as the language model gets;
    packed, or a row for every image."""
    for name, like in stock.items():
        kind = name.split("_")[0]
        whole = name in (f"{kind}_hidden_states", f"{kind}_outputs.pooler_output") or "deepstack_features" in name
        if kind not in ("image", "video") or not like or not whole:
            continue
        token = f"{kind}_token_id"
        if before.get(token, []) == after.get(token, []):
            continue
        if len(like) > 1:  # one for every row
            yield name, [(k, shape[1]) for k, shape in zip(after[token], like, strict=True)]
        elif len(like[0]) == 3:
            yield name, [(like[0][0], after[token][0], like[0][2])]
        elif len(like[0]) == 1:  # transformers 5.23 flattens LLaVA-NeXT-Video's once too often
            yield name, [(like[0][0] // sum(before[token]) * sum(after[token]),)]
        else:
            yield name, [(sum(after[token]), like[0][1])]


# "eager" returns all that "sdpa" does, and attention maps; where these are missing does not depend on the method.
KINDS = [(*pair, "eager") for pair in PAIRS] + [(*pair, "sdpa") for pair in PAIRS if pair[1] == "crossget"]


def stands_for_others(case: Case, method: str, attention: str) -> bool:
    """CrossGET with maps; a method without a cross token, in turns; every fourth family without maps."""
    number = [one.name for one in all_cases()].index(case.name)
    if attention == "sdpa":
        return number % 4 == 0
    return method == "crossget" or (is_first(case) and method in covering(case)[1:])


@pytest.mark.parametrize(
    ("case", "method", "attention"),
    [
        pytest.param(*kind, id=f"{kind[0].name}-{kind[1]}-{kind[2]}", marks=rest_unless(stands_for_others(*kind)))
        for kind in KINDS
    ],
)
@torch.no_grad()
def test_returned_states_have_the_documented_lengths(case: Case, method: str, attention: str) -> None:
    stock, before = untouched(case.name, attention)
    model = prepare(case.build(attention), method=method, **case.dial)
    randomise_cross_tokens(model)
    batch = case.batch(model)
    wanted = expected(case, model, batch, stock, before)
    found = returned(case, model, batch)
    if as_before(handle_of(model)):  # encoded ahead of the call, for the features alone
        recorded = ("image_outputs.hidden_states", "image_outputs.attentions")
        for name in [name for name in wanted[""].keys() - found[""].keys() if name.startswith(recorded)]:
            del wanted[""][name]  # where features are made of states these are there
    assert found.keys() == wanted.keys()
    for part in wanted:
        assert found[part] == wanted[part], part
