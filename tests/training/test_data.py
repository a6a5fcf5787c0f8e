"""Formats, prompt masking, bad samples, batches. The processor is the embedded model's, which needs no weights."""

from __future__ import annotations

import io

import pytest
import torch

from mllm_crossget import accelerate_mllm
from mllm_crossget.embedded.architecture import build_processor
from mllm_crossget.training import BadSampleError, Collator, TrainingData, load_records
from mllm_crossget.training.data import VICUNA_TEMPLATE, bad_samples
from tests.helpers.records import ANSWER, LLAVA_ROW, QUESTION, picture, write
from tests.helpers.tiny import tiny_llava
from tests.helpers.toy import ToySamples


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def as_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


CHAT_ROW = {
    "id": "a1",
    "images": ["one.png"],
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "How many digits are there?"},
        {"role": "assistant", "content": [{"type": "text", "text": "2"}]},
    ],
}


def parquet(folder, rows):
    import datasets

    table = [{**row, "images": [{"bytes": as_bytes(picture()), "path": None}] * len(row["images"])} for row in rows]
    for row in table:
        row["messages"] = [
            {"role": turn["role"], "content": turn["content"] if isinstance(turn["content"], str) else QUESTION}
            for turn in row["messages"]
        ]
        row["messages"][3]["content"] = "2"
    datasets.Dataset.from_list(table).cast_column("images", datasets.List(datasets.Image())).to_parquet(
        folder / "data.parquet"
    )
    return folder / "data.parquet"


@pytest.mark.parametrize("form", ["llava", "chat", "jsonl", "parquet", "disk"])
def test_every_format_gives_the_same_sample(tmp_path, processor, form):
    if form in ("llava", "chat"):
        path = write(tmp_path, [LLAVA_ROW if form == "llava" else CHAT_ROW])
    elif form == "jsonl":
        path = write(tmp_path, [CHAT_ROW, CHAT_ROW], "data.jsonl")
    else:
        path = parquet(tmp_path, [CHAT_ROW])
        if form == "disk":
            import datasets

            datasets.Dataset.from_parquet(str(path)).save_to_disk(tmp_path / "disk")
            path = tmp_path / "disk"
    data = TrainingData(load_records(path), processor)
    sample = data[0]
    learnt = sample["labels"] != -100
    # Only the two answers and their end marks are learnt.
    assert processor.decode(sample["input_ids"][learnt]) == "5 </s> 2 </s>"
    assert torch.equal(sample["input_ids"][learnt], sample["labels"][learnt])
    assert sample["input_ids"][0] == processor.tokenizer.bos_token_id
    assert (sample["input_ids"] == processor.image_token_id).sum() == 144
    assert sample["pixel_values"].shape == (1, 3, 96, 96)
    assert data.has_image == [True] * len(data)
    assert data.lengths[0] > 0


def test_text_only_rows_have_no_image(tmp_path, processor):
    row = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}
    data = TrainingData(load_records(write(tmp_path, [row])), processor)
    assert "pixel_values" not in data[0]
    assert data.has_image == [False]


def test_a_template_without_marks_is_replaced(tmp_path, processor):
    other = build_processor()
    other.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    data = TrainingData(load_records(write(tmp_path, [LLAVA_ROW])), other)
    assert data.template == VICUNA_TEMPLATE
    assert data.adds_bos
    sample = data[0]
    assert processor.decode(sample["labels"][sample["labels"] != -100]) == "5 </s> 2 </s>"


def test_pictures_are_padded_to_squares(tmp_path, processor):
    picture((60, 20), (0, 0, 0)).save(tmp_path / "wide.png")
    path = write(tmp_path, [{**LLAVA_ROW, "image": "wide.png"}])
    padded = TrainingData(load_records(path), processor)[0]["pixel_values"][0]
    kept = TrainingData(load_records(path), processor, image_aspect="keep")[0]["pixel_values"][0]
    mean = torch.tensor([122, 116, 104]) / 255 * 2 - 1
    assert torch.allclose(padded[:, 0, 0], mean, atol=0.01)
    assert torch.allclose(kept[:, 0, 0], torch.tensor(-1.0))


def bad_rows(folder):
    (folder / "broken.png").write_bytes(as_bytes(picture())[:60])
    return [
        {**LLAVA_ROW, "id": "truncated", "image": "broken.png"},
        {**LLAVA_ROW, "id": "missing", "image": "nowhere.png"},
        {**LLAVA_ROW, "id": "two tags", "conversations": [{"from": "human", "value": "<image><image>"}]},
        {**LLAVA_ROW, "id": "role", "conversations": [{"from": "narrator", "value": "x"}]},
        {"id": "empty", "image": "one.png"},
        {**LLAVA_ROW, "id": "unanswered", "conversations": LLAVA_ROW["conversations"][:1]},
        {**LLAVA_ROW, "id": "null", "conversations": [{"from": "human", "value": None}]},
        LLAVA_ROW,
    ]


def test_bad_samples_are_skipped_counted_and_named(tmp_path, processor):
    path, report = write(tmp_path, bad_rows(tmp_path)), tmp_path / "out" / "bad.jsonl"
    data = TrainingData(load_records(path), processor, bad_sample_file=report)
    good = data[7]
    for index in range(7):
        assert torch.equal(data[index]["input_ids"], good["input_ids"])
    found = bad_samples(report)
    assert set(found) == {"truncated", "missing", "two tags", "role", "empty", "unanswered", "null"}
    assert len(report.read_text().splitlines()) == 7  # each once
    assert "cannot be read" in found["truncated"]
    assert "2 image tags for 1" in found["two tags"]


@pytest.mark.parametrize("index", range(7))
def test_bad_samples_can_stop_the_run(tmp_path, processor, index):
    data = TrainingData(load_records(write(tmp_path, bad_rows(tmp_path))), processor, on_bad_sample="stop")
    with pytest.raises(BadSampleError, match=f"sample '{bad_rows(tmp_path)[index]['id']}'"):
        data[index]


def test_a_replacement_has_the_same_modality(tmp_path, processor):
    text = {"id": "t", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "red"}]}
    rows = [{**LLAVA_ROW, "id": "x", "image": "nowhere.png"}, text, LLAVA_ROW]
    data = TrainingData(load_records(write(tmp_path, rows)), processor)
    assert "pixel_values" in data[0]


def test_nothing_usable_raises(tmp_path, processor):
    rows = [{**LLAVA_ROW, "image": "nowhere.png"}]
    data = TrainingData(load_records(write(tmp_path, rows)), processor)
    with pytest.raises(ValueError, match="no usable sample"):
        data[0]


def test_too_long_samples(tmp_path, processor):
    records = load_records(write(tmp_path, [LLAVA_ROW]))
    cut = TrainingData(records, processor, max_length=160)[0]
    assert len(cut["input_ids"]) == 160
    assert (cut["labels"] != -100).sum() == 2
    for length, message in ((100, "do not fit"), (150, "no answer is left")):
        with pytest.raises(BadSampleError, match=message):
            TrainingData(records, processor, max_length=length, on_bad_sample="stop")[0]


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("{}", "expected a list"), ("[]", "holds no samples")]
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_records(tmp_path / "data.json")
    with pytest.raises(ValueError, match="does not exist"):
        load_records(tmp_path / "other.json")
    with pytest.raises(ValueError, match="on_bad_sample must be one of"):
        TrainingData(None, None, on_bad_sample="ignore")


def test_batches_are_padded_on_the_right():
    model = accelerate_mllm(tiny_llava(), keep_ratio=0.5)
    samples = ToySamples(6).samples
    batch = Collator(model, pad_token_id=0, pad_to=8)(samples)
    assert batch["input_ids"].shape[1] % 8 == 0
    assert len(batch["pixel_values"]) == 6
    assert "dummy_image" not in batch
    for row, sample in enumerate(samples):
        size = len(sample["input_ids"])
        assert torch.equal(batch["input_ids"][row, :size], sample["input_ids"])
        assert batch["attention_mask"][row].tolist() == [1] * size + [0] * (batch["input_ids"].shape[1] - size)
        assert (batch["labels"][row, size:] == -100).all()
    with pytest.raises(ValueError, match="not accelerated"):
        Collator(tiny_llava(), 0)
