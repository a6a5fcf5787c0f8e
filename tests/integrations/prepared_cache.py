"""A prepared cache of Hub datasets, as a machine with a network would have left it, from a few rows of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value
from datasets.packaged_modules.parquet.parquet import Parquet

from mllm_crossget.embedded import held_out_questions

_TEXT, _IMAGE = Value("string"), Image()


def prepare(home: Path, repository: str, config: str, split: str, columns: dict[str, Any], rows: list[dict]) -> None:
    """Write rows where ``load_dataset(repository, config)`` looks for them without a network."""
    owner, name = repository.lower().split("/")
    source = home / "sources" / f"{name}-{config}.parquet"
    source.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=Features(columns)).to_parquet(source)
    cache, mark = home / "datasets", "0" * 16
    builder = Parquet(
        cache_dir=str(cache), dataset_name=name, config_name=config, hash=mark, data_files={split: [str(source)]}
    )
    builder.download_and_prepare()
    target = cache / f"{owner}___{name}" / config / "0.0.0" / mark
    target.parent.mkdir(parents=True)
    Path(builder.cache_dir).rename(target)


def prepare_pope_and_gqa(home: Path, questions: int) -> None:
    """A few yes-or-no questions under the names of POPE and GQA."""
    asked = [question for question in held_out_questions(200) if question.kind == "exists"][:questions]
    rows = [
        {"id": str(i), "question_id": str(i), "imageId": f"picture{i}", "question": q.text, "answer": q.answer}
        for i, q in enumerate(asked)
    ]
    text = dict.fromkeys(("id", "question_id", "question", "answer"), _TEXT)
    pope = [{**{k: row[k] for k in text}, "image": q.image} for row, q in zip(rows, asked, strict=True)]
    prepare(home, "lmms-lab-encoder/POPE", "default", "test", {**text, "image": _IMAGE}, pope)
    words = dict.fromkeys(("id", "imageId", "question", "answer"), _TEXT)
    gqa = [{k: row[k] for k in words} for row in rows]
    prepare(home, "lmms-lab-encoder/GQA", "testdev_balanced_instructions", "testdev", words, gqa)
    pictures = [{"id": row["imageId"], "image": q.image} for row, q in zip(rows, asked, strict=True)]
    columns = {"id": _TEXT, "image": _IMAGE}
    prepare(home, "lmms-lab-encoder/GQA", "testdev_balanced_images", "testdev", columns, pictures)
