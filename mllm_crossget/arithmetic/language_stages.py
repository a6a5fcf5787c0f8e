"""Where tokens leave inside a language model, and how many: plain numbers. A stage is a layer in front of which tokens
leave; layers count from 0.
"""

from __future__ import annotations

from collections.abc import Sequence


def tokens_by_layer(at: Sequence[int], counts: Sequence[int], layers: int, tokens: int) -> tuple[int, ...]:
    """Visual tokens of one image in every layer.

    Args:
        at: the stages' layers, ascending.
        counts: tokens that are left from each stage on.
        layers: layers of the language model.
        tokens: tokens of the image in front of the first stage.
    """
    left = dict(zip(at, counts, strict=True))
    found = []
    for layer in range(layers):
        tokens = left.get(layer, tokens)
        found.append(tokens)
    return tuple(found)


def spread_layers(
    depths: Sequence[float], ratios: Sequence[float], layers: int, tokens: int, average: int
) -> tuple[int, ...]:
    """Layers of several stages.

    They are at the given depths if the average over the layers can be reached there with the given ratios or higher
    ones. Otherwise all of them move towards the first layer, by the same factor.

    Args:
        depths: the published depths, as shares of the layers.
        ratios: the published shares of the tokens that are left from each stage on.
        layers: layers of the language model.
        tokens: tokens of an image.
        average: the wanted average over the layers.
    """
    at: tuple[int, ...] = ()
    for steps in range(layers, 0, -1):
        at = _places([depth * steps for depth in depths], layers)
        spans = _spans(at, layers)
        total = at[0] * tokens + sum(span * ratio * tokens for span, ratio in zip(spans, ratios, strict=False))
        if total <= average * layers:
            break
    return at


def scaled_counts(
    at: Sequence[int], ratios: Sequence[float], layers: int, tokens: int, average: int
) -> tuple[int, ...]:
    """Tokens of one image that are left from each stage on: the published ratios times one factor, so that the average
    over the layers is ``average``, up to rounding.

    Raises:
        ValueError: the layers in front of the first stage have more tokens already.
    """
    spans = _spans(at, layers)
    budget = average * layers - at[0] * tokens
    if budget < sum(spans):
        least = -(-(at[0] * tokens + sum(spans)) // layers)
        raise ValueError(
            f"an average of {average} of {tokens} visual tokens over {layers} layers cannot be reached: all tokens are "
            f"in the {at[0]} layers in front of the first stage, so {least} is the least; ask for visual_tokens>="
            f"{least} or keep_ratio>={least / tokens:.3f}"
        )
    low, high = 0.0, max(1 / ratio for ratio in ratios)
    for _ in range(60):
        factor = (low + high) / 2
        if _left(spans, ratios, tokens, factor) <= budget:
            low = factor
        else:
            high = factor
    return tuple(max(1, round(min(1.0, low * ratio) * tokens)) for _, ratio in zip(spans, ratios, strict=False))


def _left(spans: Sequence[int], ratios: Sequence[float], tokens: int, factor: float) -> float:
    """Tokens in all layers from the first stage on, summed."""
    return sum(span * max(1.0, min(1.0, factor * ratio) * tokens) for span, ratio in zip(spans, ratios, strict=False))


def _places(wanted: Sequence[float], layers: int) -> tuple[int, ...]:
    """Different layers, at least 1, nearest to the wanted ones; a small model has fewer stages."""
    found: list[int] = []
    for place in wanted:
        place = max(round(place), found[-1] + 1 if found else 1)
        if place < layers:
            found.append(place)
    return tuple(found)


def _spans(at: Sequence[int], layers: int) -> list[int]:
    """Layers that each stage reaches."""
    ends = [*at[1:], layers]
    return [end - start for start, end in zip(at, ends, strict=True)]
