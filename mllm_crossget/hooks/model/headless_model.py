"""The model without its head: it takes full prompts too when it is called without the top-level ``forward``.

TRL's trainers, reward heads and retrievers call ``model.model(**inputs)`` and put a head of their own behind it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mllm_crossget.families.family import module_at
from mllm_crossget.hooks.ground.arguments import positional_names
from mllm_crossget.hooks.ground.journal import Journal
from mllm_crossget.hooks.ground.state import HANDLE, Handle, refuse_replica
from mllm_crossget.hooks.model.placeholder_model import COMPACT, compact_forward
from mllm_crossget.hooks.request.compact_call import refuse_inputs
from mllm_crossget.hooks.request.placeholders import present

_WHOLE = "_mllm_crossget_whole"


def hook_headless(journal: Journal, model: nn.Module, handle: Handle) -> None:
    """Make the part of a model that encodes images and takes the prompt compact the prompts of direct callers. Every
    change is written into ``journal``."""
    if not handle.family.features_owner:  # the model has no such part
        return
    inner = module_at(model, handle.family.features_owner)
    journal.set_attribute(inner, _WHOLE, model)
    journal.swap_class(inner, HeadlessModel)


class HeadlessModel(nn.Module):
    """Mixin for the model without its head."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, on the user's full-length inputs. ``last_hidden_state`` is full-length, with zeros at
        dropped columns, so that a head on top of it gives the logits of the whole model.

        Hidden states, attentions and the KV cache have the compact length. In training the output has
        ``alignment_loss``. A call with ``inputs_embeds`` and no images is passed to the stock model.

        Raises:
            ValueError: as the whole model's ``forward``.
        """
        refuse_replica(self)
        if args:
            kwargs.update(zip(positional_names(type(self)), args, strict=False))
        whole_model: Any = self.__dict__[_WHOLE]
        if kwargs.pop(COMPACT, False):
            return super().forward(**kwargs)
        if kwargs.get("inputs_embeds") is not None and not present(whole_model.__dict__[HANDLE], kwargs):
            return super().forward(**kwargs)
        refuse_inputs(kwargs)
        return compact_forward(whole_model, super().forward, kwargs, "last_hidden_state")
