"""``save_pretrained`` of an accelerated model: the stock checkpoint, and the library's own files beside it."""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, modeling_utils

from mllm_crossget.families.family import module_at
from mllm_crossget.files.atomic_files import TEMPORARY_PATTERN, write_text
from mllm_crossget.hooks.ground.hosts import GeneratingModel
from mllm_crossget.hooks.ground.state import HANDLE
from mllm_crossget.hooks.model.cross_files import (
    LEGACY_WEIGHTS_NAME,
    WEIGHTS_FOLDER,
    without_cross_tokens,
    write_files,
)
from mllm_crossget.hooks.model.model_card import (
    CARD_NAME,
    is_untouched,
    read_card,
    saved_card,
    settings_of,
    with_metadata_of,
    write_card,
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
            handle = vars(self)[HANDLE]
            # the card of a training says more, as long as its settings are these
            write_card(save_directory, saved_card(self, _repository(save_directory, upload)), settings_of(handle))
        if push_to_hub:
            _upload(save_directory, token=kwargs.get("token"), **upload)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | bool | None = None,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
        **commit: Any,
    ) -> str:
        """As the original, with this library's files and its model card. Returns the commit's address.

        A ``README.md`` in the repository that a person wrote or changed is kept.

        Raises:
            TypeError: an unknown keyword.
        """
        known = [name for name in _FOR_UPLOADS if name != "repo_id"]
        unknown = sorted(set(commit) - set(known))
        if unknown:
            raise TypeError(f"push_to_hub knows no {unknown}; it takes {sorted(['max_shard_size', 'tags', *known])}")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / repo_id.split("/")[-1]
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            card = saved_card(self, repo_id)
            card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or ()), *(tags or ())]))
            write_card(folder, card)
            given = {name: value for name, value in commit.items() if value is not None}
            return _upload(folder, repo_id=repo_id, token=token, **given)


def _repository(folder: Path, upload: dict[str, Any]) -> str:
    """The name under which the saved files will be found: a repository, or the folder."""
    return str(upload.get("repo_id") or folder.resolve().name)


def _upload(
    folder: Path,
    repo_id: str | None = None,
    commit_message: str = "Upload model",
    private: bool | None = None,
    token: str | bool | None = None,
    **commit: Any,
) -> str:
    api = HfApi(token=token)
    repo = api.create_repo(repo_id or folder.name, private=private, exist_ok=True)
    keeps_theirs = _keeps_theirs(folder / CARD_NAME, _card_on_hub(api, repo.repo_id, commit.get("revision")))
    return str(
        api.upload_folder(
            folder_path=folder,
            repo_id=repo.repo_id,
            commit_message=commit_message,
            ignore_patterns=[TEMPORARY_PATTERN, *([CARD_NAME] if keeps_theirs else [])],
            delete_patterns=[LEGACY_WEIGHTS_NAME, f"{WEIGHTS_FOLDER}/*"],  # files of an older push
            **commit,
        )
    )


def _card_on_hub(api: HfApi, repo_id: str, revision: str | None) -> Path | None:
    try:
        return Path(api.hf_hub_download(repo_id, CARD_NAME, revision=revision))
    except (EntryNotFoundError, RevisionNotFoundError):
        return None


def _keeps_theirs(ours: Path, theirs: Path | None) -> bool:
    """Whether the card on the hub stays: a person's text does, unless the folder has another one of a person.

    Metadata that are not this library's go from an untouched card on the hub into the new one.
    """
    new = read_card(ours)
    if theirs is None or new is None or not is_untouched(new):
        return False
    old = read_card(theirs)
    if old is None or not is_untouched(old):
        return True
    write_text(ours, str(with_metadata_of(old, new)))
    return False
