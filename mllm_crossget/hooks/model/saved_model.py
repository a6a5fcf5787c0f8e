"""``save_pretrained`` of an accelerated model: the stock checkpoint, and the library's own files beside it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, modeling_utils

from mllm_crossget.atomic_files import TEMPORARY_PATTERN
from mllm_crossget.families.family import module_at
from mllm_crossget.hooks.ground.hosts import GeneratingModel
from mllm_crossget.hooks.ground.state import HANDLE
from mllm_crossget.hooks.model.cross_files import (
    LEGACY_WEIGHTS_NAME,
    WEIGHTS_FOLDER,
    without_cross_tokens,
    write_files,
)

_FOR_UPLOADS = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr")


class SavedModel(GeneratingModel):
    """Mixin for every top-level model."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As the original, also in a process that has built no model of this class yet.

        transformers 5 registers the outputs that a class can record when an instance is built. Without that entry it
        returns no hidden states.
        """
        super().__setstate__(state)
        noted: Any = getattr(modeling_utils, "_CAN_RECORD_REGISTRY", None)
        for module in self.modules() if noted is not None else ():
            if isinstance(module, PreTrainedModel) and not noted.get(module):
                noted[module] = module._can_record_outputs

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:
        """With learned tokens, as a quantised model takes weights from the quantiser and not from ``state_dict``."""
        paths = vars(self)[HANDLE].cross_paths.values() if HANDLE in vars(self) else ()
        names = {f"{path}.{name}" for path in paths for name in module_at(self, path).state_dict()}
        return {*(vars(self).get("_keys_to_ignore_on_save") or ()), *names}

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, value: set[str] | list[str] | None) -> None:
        vars(self)["_keys_to_ignore_on_save"] = value

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As the original - the checkpoint holds the stock weights alone - plus ``crossget_config.json`` and the
        learned tokens beside it. ``push_to_hub`` uploads the whole folder.

        Raises:
            OSError: a file cannot be written.
            ValueError: arguments of an upload without ``push_to_hub``.
            TypeError: an unknown keyword.
        """
        upload = {name: kwargs.pop(name) for name in _FOR_UPLOADS if name in kwargs}
        if upload and not push_to_hub:
            raise ValueError(f"{sorted(upload)} are for uploads: give push_to_hub=True too, or leave them out")
        if kwargs.get("safe_serialization"):  # transformers 5 writes nothing else
            del kwargs["safe_serialization"]
        known = inspect.signature(super().save_pretrained).parameters
        unknown = sorted(set(kwargs) - set(known))
        if unknown:
            raise TypeError(f"save_pretrained knows no {unknown}; it takes {sorted({*known, *_FOR_UPLOADS})}")
        save_directory = Path(save_directory).expanduser()
        state = self.state_dict() if state_dict is None else state_dict
        try:
            super().save_pretrained(save_directory, is_main_process, without_cross_tokens(state), **kwargs)
        except SafetensorError as error:
            raise OSError(f"the checkpoint in {save_directory} could not be written: {error}") from error
        if is_main_process:
            write_files(self, save_directory, state)
        if push_to_hub:
            _upload(Path(save_directory), token=kwargs.get("token"), **upload)


def _upload(
    folder: Path,
    repo_id: str | None = None,
    commit_message: str = "Upload model",
    private: bool | None = None,
    token: str | bool | None = None,
    **commit: Any,
) -> None:
    api = HfApi(token=token)
    repo = api.create_repo(repo_id or folder.name, private=private, exist_ok=True)
    api.upload_folder(
        folder_path=folder,
        repo_id=repo.repo_id,
        commit_message=commit_message,
        ignore_patterns=[TEMPORARY_PATTERN],
        delete_patterns=[LEGACY_WEIGHTS_NAME, f"{WEIGHTS_FOLDER}/*"],  # files of an older push
        **commit,
    )
