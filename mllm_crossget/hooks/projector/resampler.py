"""Towers for images of any size, followed by a cross-attention resampler (Idefics2, Aria).

The stock tower takes images of different sizes padded to the largest one, with a mask of patches. Padding must not
merge with patches, and an image's number of tokens must not depend on other images. So every image is cropped to its
patches, and images of one size run together. The outputs are padded again, and the resampler gets a mask of that
padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mllm_crossget.families.family import module_at
from mllm_crossget.hooks.ground.call_state import Lent, lent
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import Handle
from mllm_crossget.hooks.projector.features import ReducedFeatures
from mllm_crossget.hooks.projector.readers import LOG_SIZES, log_sizes
from mllm_crossget.hooks.tower.counts_per_image import recorded_sizes
from mllm_crossget.hooks.tower.fixed_counts import share_state, tower_state
from mllm_crossget.methods.method import Place

_PATHS = "_mllm_crossget_resampled"
_CALL = "resampled"
_ENCODER, _WEIGHS = "_mllm_crossget_resampled_encoder", "_mllm_crossget_resampled_weighs"


class ResampledFeatures(ReducedFeatures):
    """Mixin for the owner of ``get_image_features``: tower and resampler share a dictionary of one call.

    Class attributes:
        resampler: mixin for the module that reads the tower's tokens.
    """

    resampler: ClassVar[type[nn.Module]]

    refused: ClassVar[Mapping[Place, str]] = {
        Place.TOWER_OUTPUT: "its images are of any size and run group by group; selecting behind them is not written",
        Place.PROJECTOR: "its resampler gives as many vectors as it has queries, which prompts have placeholders for",
    }

    @classmethod
    def install(cls, journal: Journal, owner: nn.Module, handle: Handle) -> None:
        """See ``ReducedFeatures.install``."""
        family = handle.family
        paths = [str(path).removeprefix(f"{family.features_owner}.") for path in (family.tower, family.projector)]
        journal.set_attribute(owner, _PATHS, paths)
        journal.swap_class(owner, cls)
        if handle.tower is None:
            raise RuntimeError("these features are those of a reduced tower")
        handle.tower.ignores_mask = True
        tower, resampler = (module_at(owner, path) for path in paths)
        share_state(journal, tower, handle.tower)
        journal.set_attribute(tower, _ENCODER, handle.encoder_path.removeprefix(f"{family.tower}."))
        journal.swap_class(tower, CroppedTower)
        journal.set_attribute(resampler, _WEIGHS, handle.weighs_readers)
        journal.swap_class(resampler, cls.resampler)

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with the same number of features per image."""
        with Lent(_CALL, {}, *[module_at(self, path) for path in self.__dict__[_PATHS]]):
            return super().get_image_features(*args, **kwargs)


class CroppedTower(nn.Module):
    """Mixin for a tower with ``patch_attention_mask``: (B, rows, columns), True where a patch belongs to the image."""

    config: Any

    def forward(self, pixel_values: Tensor, patch_attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As the original on every image without its padding; outputs are padded with zeros at the end.

        Raises:
            ValueError: an image's patches are not a rectangle in the upper left corner.
        """
        stock, call = super().forward, _call_of(self)
        encoder, read = module_at(self, self.__dict__[_ENCODER]), tower_state(self).geometry.read
        token_sizes: list[Tensor] = []  # of every group

        def run(pixels: Tensor) -> Any:
            with recorded_sizes(encoder) as recorded:
                output = stock(pixels, patch_attention_mask=None, **kwargs)
            token_sizes.append(recorded[read - 1])
            return output

        patch = self.config.patch_size
        grid = (pixel_values.shape[2] // patch, pixel_values.shape[3] // patch)
        call["patches"] = grid[0] * grid[1]
        sizes = [grid] * len(pixel_values) if patch_attention_mask is None else _rectangles(patch_attention_mask)
        if set(sizes) <= {grid}:
            output = run(pixel_values)
            call["sizes"] = token_sizes[0]
            return output
        outputs, order = [], []
        for size in sorted(set(sizes), reverse=True):
            members = [index for index, other in enumerate(sizes) if other == size]
            rows, columns = size[0] * patch, size[1] * patch
            outputs.append(run(pixel_values[members, :, :rows, :columns]))
            order += members
        places = torch.tensor(order).argsort()
        lengths = [length for output in outputs for length in [output.last_hidden_state.shape[1]] * len(output[0])]
        call["lengths"] = torch.tensor(lengths)[places]
        places = places.to(pixel_values.device)
        call["sizes"] = _padded([size[..., None] for size in token_sizes], 1)[places][..., 0]
        return _joined(outputs, places)


class MaskedConnector(nn.Module):
    """Mixin for Idefics2's connector: it gets a new mask, True for real tokens, and lends the log token sizes to the
    perceiver."""

    perceiver_resampler: nn.Module

    def forward(self, image_hidden_states: Tensor, attention_mask: Tensor) -> Any:
        """As the original."""
        call = _call_of(self)
        if "patches" in call:
            attention_mask = _real_tokens(image_hidden_states, call)
        bias = _log_sizes(self, call, image_hidden_states)
        with Lent(LOG_SIZES, bias, self.perceiver_resampler):
            return super().forward(image_hidden_states, attention_mask)


class CountedProjector(nn.Module):
    """Mixin for Aria's projector: it gets a new mask, True for padding, or the log token sizes, which hide padding too.
    The projector looks its number of queries up by the number of patches; it gets the number for the patches of the
    untouched tower."""

    def forward(self, key_value_states: Tensor, attn_mask: Tensor | None = None) -> Any:
        """As the original."""
        call = _call_of(self)
        if "patches" not in call:
            return super().forward(key_value_states, attn_mask)
        queries: Any = self.patch_to_query_dict
        if call["patches"] not in queries:
            raise ValueError(
                f"images of {call['patches']} patches, but the projector knows {sorted(queries)}; resize them with the "
                "model's processor"
            )
        mask = _log_sizes(self, call, key_value_states)
        if mask is not None:
            mask = mask.to(key_value_states.dtype)
        elif "lengths" in call:
            mask = ~_real_tokens(key_value_states, call)
        twin: Any = object.__new__(type(self))  # a copy with the same parts: other threads read the original's table
        twin.__dict__.update(self.__dict__, patch_to_query_dict={key_value_states.shape[1]: queries[call["patches"]]})
        return super(CountedProjector, twin).forward(key_value_states, mask)


class MaskedResamplerFeatures(ResampledFeatures):
    """For Idefics2."""

    resampler: ClassVar[type[nn.Module]] = MaskedConnector


class CountedResamplerFeatures(ResampledFeatures):
    """For Aria."""

    resampler: ClassVar[type[nn.Module]] = CountedProjector


def _call_of(module: nn.Module) -> dict[str, Any]:
    """The dictionary that modules share in this call; a new empty one outside of a call."""
    found: dict[str, Any] | None = lent(_CALL, module)
    return {} if found is None else found


def _log_sizes(resampler: nn.Module, call: dict[str, Any], states: Tensor) -> Tensor | None:
    """(B, T) log token sizes for a resampler that weighs tokens by them; None for another, and outside of a call."""
    return log_sizes(call.get("sizes"), states) if resampler.__dict__[_WEIGHS] else None


def _rectangles(mask: Tensor) -> list[tuple[int, int]]:
    """(B, rows, columns) mask of patches -> (rows, columns) of each of the B images."""
    mask = mask.bool()
    rows, columns = mask[:, :, 0].sum(dim=1), mask[:, 0, :].sum(dim=1)
    down, right = (torch.arange(size, device=mask.device) for size in mask.shape[1:])
    rectangle = (down[None, :, None] < rows[:, None, None]) & (right[None, None, :] < columns[:, None, None])
    if not torch.equal(rectangle, mask) or bool((rows == 0).any()):
        raise ValueError(
            "the mask of an image's pixels is no rectangle in the upper left corner; pass pixel_values and their mask "
            "as the model's processor makes them, or restore_mllm(model) first"
        )
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def _real_tokens(tokens: Tensor, call: dict[str, Any]) -> Tensor:
    """(B, T) False for padding."""
    lengths = call.get("lengths", torch.full((len(tokens),), tokens.shape[1]))
    return torch.arange(tokens.shape[1], device=tokens.device) < lengths.to(tokens.device)[:, None]


def _joined(outputs: list[Any], places: Tensor) -> Any:
    """Several outputs joined into one, with the images in the order of ``places``, padded with zeros."""
    joined = outputs[0]
    joined.last_hidden_state = _padded([output.last_hidden_state for output in outputs], 1)[places]
    for name, dims in (("hidden_states", 1), ("attentions", 2)):
        if joined.get(name):
            layers = zip(*(output[name] for output in outputs), strict=True)
            joined[name] = tuple(None if layer[0] is None else _padded(list(layer), dims)[places] for layer in layers)
    return joined


def _padded(parts: list[Tensor], dims: int) -> Tensor:
    """(b, t, D) states (``dims`` 1) or (b, heads, t, t) maps (``dims`` 2), padded to the longest t and concatenated."""
    longest = max(part.shape[-2] for part in parts)
    rows = []
    for part in parts:
        missing = longest - part.shape[-2]
        rows.append(nn.functional.pad(part, (0, missing if dims == 2 else 0, 0, missing)))
    return torch.cat(rows)
