"""The answer log: every batch is on disk before the next one starts, so that a killed run can resume.

``answers.rank<r>.jsonl`` has a line that identifies the run, then one JSON line per batch. A run reads the files of all
ranks, so that it can resume with another number of processes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

from mllm_crossget.files.atomic_files import write_text
from mllm_crossget.integrations.lmms_eval.requests import Request


class AnswerLog:
    """Answers of a run by request, in memory and, if there is a folder, on disk.

    Args:
        folder: folder of the files; None keeps the answers in memory only.
        settings: settings that the answers depend on, as JSON types.
        rank: rank of this process.

    Raises:
        ValueError: the folder holds answers of a run with other settings, or a damaged file.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any], rank: int) -> None:
        self.batches: list[dict[str, Any]] = []
        self._texts: dict[tuple[str, ...], dict[str, Any]] = {}
        self._file: TextIO | None = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        own_file = folder / f"answers.rank{rank}.jsonl"
        for path in sorted(folder.glob("answers.rank*.jsonl")):
            for record in _records(path, settings, repair=path == own_file):
                self._remember(record, mine=path == own_file)
        self._file = own_file.open("a", encoding="utf-8")
        if own_file.stat().st_size == 0:
            self._write({"run": settings})

    def get(self, request: Request) -> dict[str, Any] | None:
        """The logged answer to a request, or None."""
        return self._texts.get(request.key)

    def add(self, batch: dict[str, Any]) -> None:
        """Log a batch: ``answers`` (each with key, text and counts), ``seconds`` and ``peak_memory``."""
        self._remember(batch, mine=True)
        if self._file is not None:
            self._write(batch)

    def _remember(self, batch: dict[str, Any], mine: bool) -> None:
        if mine:
            self.batches.append(batch)
        self._texts |= {tuple(answer["key"]): answer for answer in batch["answers"]}

    def _write(self, record: dict[str, Any]) -> None:
        assert self._file is not None  # checked by the callers
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def read_batches(folder: Path) -> list[dict[str, Any]]:
    """The batches of all ranks from a folder of finished answer logs; empty if there are none."""
    texts = [_whole_lines(path.read_bytes()) for path in sorted(folder.glob("answers.rank*.jsonl"))]
    records = [json.loads(line) for text in texts for line in text.splitlines()]
    return [record for record in records if "answers" in record]


def _whole_lines(data: bytes) -> str:
    """The text without an incomplete last line, which a kill may cut even inside a character."""
    return data[: data.rfind(b"\n") + 1].decode()


def _records(path: Path, settings: dict[str, Any], repair: bool) -> list[dict[str, Any]]:
    """The batches of one file. An incomplete last line is dropped, and removed from the process's own file."""
    data = path.read_bytes()
    text = _whole_lines(data)
    if repair and len(text.encode()) != len(data):
        write_text(path, text)
    try:
        records = [json.loads(line) for line in text.splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to start anew") from error
    logged = records[0].get("run", {}) if records else settings
    if logged != settings:
        differing = sorted(name for name in {*settings, *logged} if settings.get(name) != logged.get(name))
        raise ValueError(
            f"{path} holds the answers of a run with other settings ({', '.join(differing)}): delete it, or give "
            "another folder"
        )
    return records[1:]
