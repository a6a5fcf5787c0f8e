"""A prepared cache of Hub datasets, as a machine with a network would have left it, from a few rows of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value
from datasets.naming import camelcase_to_snakecase
from datasets.packaged_modules.parquet.parquet import Parquet

from mllm_crossget.embedded import held_out_questions

_TEXT, _IMAGE = Value("string"), Image()


def prepare(home: Path, repository: str, config: str, split: str, columns: dict[str, Any], rows: list[dict]) -> None:
    """Write rows where ``load_dataset(repository, config)`` looks for them without a network."""
    owner, name = repository.split("/")
    name = camelcase_to_snakecase(name)  # as the folders of the cache are called
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


def prepare_public_tasks(home: Path, questions: int) -> None:
    """A few rows for every public data set that the tests' tasks ask for."""
    asked = [question for question in held_out_questions(200) if question.kind == "exists"][:questions]
    _pope_and_gqa(home, asked)
    _choices(home, asked)


def _choices(home: Path, asked: list[Any]) -> None:
    """MMBench, SEED-Bench (every third row a video of two frames), Flickr30k and COCO 2017."""
    options = {"A": "1", "B": "2", "C": "3", "D": "4"}
    words = dict.fromkeys(("question", "hint", "answer", "category", "L2-category", "source", "split", *options), _TEXT)
    rows = [
        {"index": i, "question": q.text, "answer": "ABCD"[i % 4], **options, "image": q.image}
        for i, q in enumerate(asked)
    ]
    blank = {"hint": "nan", "category": "c", "L2-category": "l", "source": "s", "split": "dev"}
    columns = {**words, "index": Value("int64"), "image": _IMAGE}
    prepare(home, "lmms-lab-encoder/MMBench", "cn", "dev", columns, [{**blank, **row} for row in rows])

    letters = [f"choice_{letter}" for letter in "abcd"]
    columns = dict.fromkeys(("question", "answer", "question_id", "data_type", *letters), _TEXT)
    seed = [
        {
            **{"question": q.text, "answer": "B", "question_id": str(i), **dict.fromkeys(letters, "x")},
            **{"data_type": "image" if i % 3 else "video", "image": [q.image] * (1 if i % 3 else 2)},
        }
        for i, q in enumerate(asked)
    ]
    prepare(home, "lmms-lab-encoder/SEED-Bench", "default", "test", {**columns, "image": List(_IMAGE)}, seed)
    for repository, split, column in (("flickr30k", "test", "caption"), ("COCO-Caption2017", "val", "answer")):
        captions = [{column: [f"caption {i}", "another"], "image": q.image} for i, q in enumerate(asked)]
        columns = {column: List(_TEXT), "image": _IMAGE}
        prepare(home, f"lmms-lab-encoder/{repository}", "default", split, columns, captions)


def _pope_and_gqa(home: Path, asked: list[Any]) -> None:
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
