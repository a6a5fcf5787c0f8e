"""The learned text cross tokens in vLLM's language model: they shift the first token of a prompt, in every layer.

vLLM computes the first token of a prompt once, in one of the prompt's chunks, or not at all if its keys are cached,
which then hold the shift already.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mllm_crossget.integrations.vllm.columns import Columns

_HIDDEN = 1
"""vLLM calls decoder layers with positions, hidden states and residual; the stream is the sum of the last two."""


def write_first(language_model: Any, vectors: Tensor, columns: Columns) -> None:
    """Let decoder layers add their cross token to the first token of every prompt.

    Args:
        language_model: vLLM's, with ``layers``, of which this process may have a part.
        vectors: (layers, D).
        columns: where a step's first tokens are written down.

    Raises:
        ValueError: another number of vectors than of layers, or vectors of another width.
    """
    layers = language_model.layers
    width = language_model.config.hidden_size
    if vectors.shape != (len(layers), width):
        raise ValueError(
            f"text.cross has shape {tuple(vectors.shape)}, the language model needs {(len(layers), width)}"
        )
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(_hook(vectors[index], columns), with_kwargs=True)


def _hook(vector: Tensor, columns: Columns) -> Any:
    def add(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[_HIDDEN]
        shifted = hidden + columns.first[: hidden.shape[0], None].to(hidden.dtype) * vector
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": shifted}
        return (*args[:_HIDDEN], shifted, *args[_HIDDEN + 1 :]), kwargs

    return add
