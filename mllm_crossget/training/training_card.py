"""The card of a training: that of a saved model, with what it was trained on and its last figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import Trainer

from mllm_crossget.embedded import WEIGHTS_FOLDER
from mllm_crossget.hooks.ground.state import HANDLE, base_model, wrapped_by_peft
from mllm_crossget.hooks.model.model_card import CardParts, card_of, is_of_hub, public_name
from mllm_crossget.training.options import output_folder


def trained_card(trainer: Trainer, base: str, dataset: Any) -> ModelCard:
    """A model card with the run's metrics, in the hub's format.

    Args:
        trainer: the trainer after the run.
        base: name of the base model: a repository, a folder, or "embedded".
        dataset: what it was trained on, for readers on other machines.
    """
    wrapped: Any = trainer.model
    model: Any = base_model(wrapped)
    final = next((entry for entry in reversed(trainer.state.log_history) if "task_loss" in entry), {})
    is_adapter = wrapped_by_peft(wrapped)
    data = {"library_name": "peft" if is_adapter else "transformers", "pipeline_tag": "image-text-to-text"}
    if is_of_hub(base):
        data["base_model_relation"] = "adapter" if is_adapter else "finetune"
    folder = output_folder(trainer.args).name
    parts = CardParts(
        title=folder,
        base=public_name(str(WEIGHTS_FOLDER) if base == "embedded" else base, type(model).__name__),
        loading=_loading(base, type(model).__name__, folder, is_adapter),
        trained=f"It was fine-tuned on {dataset} for {trainer.state.global_step} steps.",
        metrics={name: value for name, value in final.items() if isinstance(value, int | float)},
        data=data,
    )
    return card_of(model.__dict__[HANDLE], parts)


def _loading(base: str, kind: str, folder: str, is_adapter: bool) -> list[str]:
    """The lines that load the result: an adapter onto its base model, or a whole model."""
    if not is_adapter:
        first = f'base_model = {kind}.from_pretrained("{folder}")'
    elif base == "embedded" or Path(base) == WEIGHTS_FOLDER:
        first = "base_model, _ = load_embedded()"
    else:
        first = f'base_model = {kind}.from_pretrained("{base if is_of_hub(base) else Path(base).name or kind}")'
    embedded = first.endswith("load_embedded()")
    source = "from mllm_crossget.embedded import load_embedded" if embedded else f"from transformers import {kind}"
    load = "load_finetuned" if is_adapter else "load_crossget"
    place = "mllm_crossget.training" if is_adapter else "mllm_crossget"
    return [source, f"from {place} import {load}", "", first, f'model = {load}(base_model, "{folder}")']
