"""How many placeholders each image has in the user's prompt, and how many features the language model gets for it.

All functions read the keyword arguments of ``forward`` or ``generate`` and change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mllm_crossget.families.modality import Modality, all_of
from mllm_crossget.hooks.ground.state import Handle, MergeState
from mllm_crossget.hooks.projector.features import ahead_of, encode_ahead
from mllm_crossget.hooks.projector.groups import groups_of, joined_groups
from mllm_crossget.hooks.request.compaction import TRUNCATED


def given_features(modality: Modality, kwargs: dict[str, Any]) -> Any:
    """Precomputed features of a modality in a call: (images, ·, ·), a list, or None."""
    outputs = kwargs.get("mm_encoder_outputs") or {}
    return None if outputs.get(modality.name) is None else outputs[modality.name].pooler_output


def present(handle: Handle, kwargs: dict[str, Any]) -> list[Modality]:
    """The modalities that a call holds, as pixels or as precomputed features."""
    return [
        modality
        for modality in handle.family.modalities
        if kwargs.get(modality.pixels) is not None or given_features(modality, kwargs) is not None
    ]


def token_of(model: nn.Module, modality: Modality) -> int:
    """Token id of a modality's placeholder."""
    return int(getattr(model.config, modality.token))


def placeholders_of(model: nn.Module, handle: Handle, modality: Modality, kwargs: dict[str, Any]) -> list[int]:
    """Number of placeholders that the untouched model needs for each image."""
    features = given_features(modality, kwargs)
    if features is not None and handle.merging is not None and getattr(handle.geometry, "fixed", True):
        images = sum(len(image) for image in features) // handle.schedule.features
        return [handle.schedule.placeholders] * images
    if features is not None and modality.reduced_counts is not None:
        frames = frames_of(model, handle, modality, features)
        return [_counted(model, modality, count, all_of) for count in frames]
    if modality.counts is not None:
        return modality.counts(model, kwargs)
    if features is not None:
        return [handle.schedule.placeholders] * len(features)
    return [_tokens_of_size(model, handle, modality, kwargs)] * len(kwargs[modality.pixels])


def _tokens_of_size(model: nn.Module, handle: Handle, modality: Modality, kwargs: dict[str, Any]) -> int:
    """Number of placeholders per image, in a call whose images all have the same size."""
    if modality.tokens_of is None:
        return handle.schedule.placeholders
    return modality.tokens_of(model.config, kwargs[modality.pixels])


def known_features(model: nn.Module, handle: Handle, modality: Modality, kwargs: dict[str, Any]) -> list[int] | None:
    """Number of features of each image, where known without encoding; else None."""
    features = given_features(modality, kwargs)
    if features is not None:
        return [len(image) for image in features]
    if handle.method.is_dynamic:
        return None
    if modality.reduced_counts is not None:
        return modality.reduced_counts(model, kwargs, lambda tokens: _kept_of_part(handle, modality, tokens))
    if handle.merging is not None:
        return _merged_counts(handle.merging, placeholders_of(model, handle, modality, kwargs))
    if modality.counts is not None:
        return None
    tokens, kept = _tokens_of_size(model, handle, modality, kwargs), handle.schedule.features
    if handle.second_merge is not None and tokens != handle.schedule.placeholders:
        kept = handle.second_merge.schedule(tokens).features
    return [kept] * len(kwargs[modality.pixels])


@contextmanager
def mismatch_explained(model: nn.Module, handle: Handle, kwargs: dict[str, Any]) -> Iterator[None]:
    """Explain the stock code's error for a prompt that does not fit its images: raise it again with the right counts.
    It is needed where the number of features is known only after encoding."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if "do not match" not in str(error):
            raise
        counted = [
            f"{int((kwargs['input_ids'] == token_of(model, one)).sum())} {one.name} placeholders where the processor "
            f"makes {sum(placeholders_of(model, handle, one, kwargs))}"
            for one in present(handle, kwargs)
        ]
        if not counted:
            raise
        raise ValueError(
            f"the prompt holds {' and '.join(counted)}, which is neither the full prompt nor one for the merged tokens "
            f"({error}). {TRUNCATED}"
        ) from error


def frames_of(model: nn.Module, handle: Handle, modality: Modality, features: Any) -> list[int]:
    """Number of frames in each entry of precomputed video features.

    Raises:
        ValueError: the length of an entry fits no whole number of frames.
    """
    one, two = (_counted(model, modality, frames, lambda tokens: _kept_of_part(handle, modality, tokens))
                for frames in (1, 2))  # fmt: skip
    lengths = [len(entry) for entry in features]
    if any((length - one) % (two - one) or length < one for length in lengths):
        raise ValueError(
            f"precomputed features of {modality.name}s have lengths {lengths}, but a frame has {two - one} at the "
            "present settings; make them with get_video_features of the accelerated model"
        )
    return [1 + (length - one) // (two - one) for length in lengths]


def _counted(model: nn.Module, modality: Modality, frames: int, kept: Callable[[int], int]) -> int:
    """Number of features of one video with ``frames`` frames."""
    if modality.reduced_counts is None:
        raise RuntimeError(f"{modality.name}s have no frames")
    return modality.reduced_counts(model, {modality.pixels: torch.empty(1, frames)}, kept)[0]


def _kept_of_part(handle: Handle, modality: Modality, tokens: int) -> int:
    """Number of features of a frame with ``tokens`` placeholders."""
    if modality.name in handle.modality_towers:
        return handle.modality_towers[modality.name].schedule.features
    return tokens if handle.second_merge is None else handle.second_merge.schedule(tokens).features


def _merged_counts(merging: MergeState, placeholders: list[int]) -> list[int]:
    return [merging.schedule(tokens).features for tokens in placeholders]


def image_counts(model: nn.Module, handle: Handle, modality: Modality, kwargs: dict[str, Any]) -> list[tuple[int, int]]:
    """(placeholders in the user's prompt, features) of each image; encodes the images if the counts depend on them."""
    placeholders = placeholders_of(model, handle, modality, kwargs)
    if handle.merging is not None:
        return list(zip(placeholders, _merged_counts(handle.merging, placeholders), strict=True))
    known = known_features(model, handle, modality, kwargs)
    features = encode_ahead(model, handle.family, modality, kwargs) if known is None else known
    return list(zip(placeholders, features, strict=True))


def expected_counts(
    model: nn.Module, handle: Handle, modality: Modality, kwargs: dict[str, Any]
) -> list[tuple[int, int]]:
    """As ``image_counts``, without encoding: counts that depend on the image are the settings' average share."""
    placeholders = placeholders_of(model, handle, modality, kwargs)
    known = known_features(model, handle, modality, kwargs)
    if known is None:
        share = handle.schedule.features / handle.schedule.placeholders
        known = [min(count, round(count * share)) for count in placeholders]
    return list(zip(placeholders, known, strict=True))


def _with_newlines(size: Tensor, place: Tensor, whole: int, kept: int) -> tuple[Tensor, Tensor]:
    """Sizes and places of one video, with the newlines that models before transformers 5.23 append only in ``forward``:
    ``kept`` entries altogether, for ``whole`` placeholders."""
    missing = kept - len(size)
    if missing <= 0:
        return size, place
    return torch.cat([size, size.new_ones(missing)]), torch.cat([place, place.new_full((missing,), whole - 1)])


def groups_of_call(
    model: nn.Module,
    handle: Handle,
    kwargs: dict[str, Any],
    images: dict[int, list[tuple[int, int]]] | None = None,
) -> dict[int, list[tuple[Tensor, Tensor]]] | None:
    """For every placeholder token id, (k,) token sizes and (k,) places of each image's features; encodes the images.

    Raises:
        ValueError: precomputed features without a record of the tokens that they stand for.
    """
    groups_of_token: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for modality in present(handle, kwargs):
        output = (kwargs.get("mm_encoder_outputs") or {}).get(modality.name)
        is_precomputed = output is not None
        if output is None:
            output = ahead_of(model, handle.family, modality, kwargs)
        groups = groups_of(output)
        if groups is None and is_precomputed:
            raise ValueError(
                f"mm_encoder_outputs[{modality.name!r}] does not say which tokens its features stand for; make it with "
                f"this model's {modality.encode}(..., return_dict=True), or pass {modality.pixels}"
            )
        if groups is None:  # nothing was merged: the features are those of the untouched model
            return None
        counts = (images or {}).get(token_of(model, modality), [])
        frames = len(groups) // len(counts) if counts else 1
        if frames > 1:  # encoded frame by frame, counted per video
            groups = [
                joined_groups(groups[video * frames : (video + 1) * frames], [n // frames] * frames)
                for video, (n, _) in enumerate(counts)
            ]
        pairs: list[tuple[Tensor, Tensor]] = [(one.size, one.place) for one in groups]
        if counts:
            pairs = [_with_newlines(*one, whole, kept) for one, (whole, kept) in zip(pairs, counts, strict=True)]
        groups_of_token[token_of(model, modality)] = pairs
    return groups_of_token


def images_per_row(model: nn.Module, handle: Handle, kwargs: dict[str, Any]) -> Tensor:
    """(B,) tower images (a tile or a frame counts as one) in every row of a compact prompt.

    Only the first modality of the family that the call holds is counted, because one forward records the cross tokens
    of one encoding.
    """
    modality = present(handle, kwargs)[0]
    features = known_features(model, handle, modality, kwargs)
    if features is None:
        features = encode_ahead(model, handle.family, modality, kwargs)
    precomputed = given_features(modality, kwargs)
    if precomputed is not None and modality.reduced_counts is not None:
        parts = frames_of(model, handle, modality, precomputed)
    else:
        parts = [1] * len(features) if modality.parts is None else modality.parts(model, kwargs)
    ends = torch.tensor(features).cumsum(0)
    rows = (kwargs["input_ids"] == token_of(model, modality)).sum(dim=1).cumsum(0).cpu()
    row_of_image = torch.searchsorted(rows, ends)  # the first row that ends at or after the image's last placeholder
    return torch.zeros(len(rows), dtype=torch.int64).index_add(0, row_of_image, torch.tensor(parts))
