"""Data as users have it: pictures of every kind, templates without end marks, columns that nobody reads."""

from __future__ import annotations

import json
import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers.image_utils import load_image

from mllm_crossget.embedded.architecture import build_processor
from mllm_crossget.files.records import Records
from mllm_crossget.files.user_files import open_picture
from mllm_crossget.training import BadSampleError, TrainingData, load_records
from mllm_crossget.training.data import VICUNA_TEMPLATE
from tests.helpers.records import ANSWER, LLAVA_ROW, QUESTION, write

TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
PUBLISHED = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% if m['role'] != 'assistant' %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}{% else %}"
    "{% for c in m['content'] if c['type'] == 'text' %}"
    "{% generation %}{{ c['text'] + ' ' }}{% endgeneration %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.fixture
def processor():
    return build_processor()


def learned(sample) -> list[int]:
    return sample["input_ids"][sample["labels"] != -100].tolist()


def two_turns() -> Records:
    return Records([{"id": "a", "messages": [*TURNS, *TURNS]}])


@pytest.mark.parametrize(
    "template",
    [
        PUBLISHED,
        PUBLISHED.replace("{% endgeneration %}", "{% endgeneration %}</s>"),
        PUBLISHED.replace("{{ c['text'] + ' ' }}{% endgeneration %}", "{{ c['text'] }}</s>{% endgeneration %}"),
        "",
    ],
    ids=["no mark", "behind", "inside", "replaced"],
)
def test_every_answer_ends_with_one_end_mark_that_is_learned(processor, template) -> None:
    processor.chat_template = template
    sample = TrainingData(two_turns(), processor)[0]
    tokenizer = processor.tokenizer
    answer = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    assert learned(sample) == [*answer, tokenizer.eos_token_id] * 2
    assert sample["input_ids"].tolist().count(tokenizer.eos_token_id) == 2


def test_a_replaced_template_ends_with_the_tokenizers_own_mark(processor) -> None:
    processor.chat_template = ""
    processor.tokenizer.eos_token = "."
    sample = TrainingData(two_turns(), processor)[0]
    assert learned(sample)[-1] == processor.tokenizer.eos_token_id != 2


def rotated(folder):
    half = np.zeros((96, 96, 3), np.uint8)
    half[:48], half[48:] = (255, 0, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(half).save(folder / "exif.png", exif=exif)
    return folder / "exif.png"


def test_pictures_are_the_right_way_up(tmp_path, processor) -> None:
    file = rotated(tmp_path)
    expected = np.asarray(load_image(str(file)))
    assert not np.array_equal(expected, np.asarray(Image.open(file)))
    with Image.open(file) as opened:
        for source in (file, str(file), file.read_bytes(), {"bytes": file.read_bytes(), "path": None}, opened):
            assert np.array_equal(np.asarray(Records([]).open(source, "a")), expected)


def test_arrays_and_tensors_are_pictures(processor) -> None:
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    forms = [values, torch.from_numpy(values), values.transpose(2, 0, 1), values.astype(np.int64),
             torch.from_numpy(values).float() / 255]  # fmt: skip
    for form in forms:
        row = {"id": "a", "images": [form], "messages": TURNS}
        assert np.array_equal(np.asarray(Records([row]).open(Records([row])[0].images[0], "a")), values)
    two = Records([{"id": "a", "images": torch.stack([torch.from_numpy(values)] * 2), "messages": TURNS}])
    assert len(two[0].images) == 2
    assert open_picture(values[..., 0]).size == open_picture(values[..., :1]).size == (60, 40)
    for bad in (values.astype(np.float32), np.full((4, 4), np.nan), np.zeros((2, 3, 4, 5)), np.zeros((0, 4)),
                np.full((4, 4), 300), values[..., :2]):  # fmt: skip
        with pytest.raises(BadSampleError, match="is no picture"):
            Records([]).open(bad, "a")


def test_texts_around_pictures_stay_apart(processor) -> None:
    parts = [{"type": "text", "text": "Which"}, {"type": "image"}, {"type": "text", "text": "digit"},
             {"type": "image"}, {"type": "text", "text": "is red?"}]  # fmt: skip
    rows = [{"id": "a", "images": ["1", "2"], "messages": [{"role": "user", "content": parts}, TURNS[1]]}]
    data = TrainingData(Records(rows), processor)
    for template in (data.template, VICUNA_TEMPLATE):
        text = processor.apply_chat_template(data.records[0].messages, chat_template=template, tokenize=False)
        assert "Which digit is red?" in text


def test_system_turns_are_read_wherever_they_stand_and_never_learned(processor) -> None:
    first = [{"role": "system", "content": "red"}, {"role": "system", "content": "blue"}]
    rows = [{"id": "a", "messages": [*first, *TURNS, {"role": "system", "content": "green"}, *TURNS]}]
    for template in (processor.chat_template, ""):
        processor.chat_template = template
        sample = TrainingData(Records(rows), processor)[0]
        text = processor.decode(sample["input_ids"])
        assert all(colour in text for colour in ("red", "blue", "green"))
        assert processor.decode(learned(sample)) == f"{ANSWER} </s> {ANSWER} </s>"


def test_words_that_the_tokenizer_does_not_know_are_told(processor) -> None:
    odd = [{"role": "user", "content": "Welch Ziffer is red?"}, {"role": "assistant", "content": "fünfundzwanzig"}]
    rows = [{"id": "a", "messages": odd}, *({"id": str(i), "messages": [odd[0], TURNS[1]]} for i in range(4))]
    with pytest.warns(UserWarning, match=r"100% of the questions and 20% of the answers .*'<unk>': .*Ziffer"):
        TrainingData(Records(rows), processor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrainingData(two_turns(), processor)


def test_a_bad_sample_in_a_worker_is_still_one(tmp_path, processor) -> None:
    error = BadSampleError("7", "broken")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.identity, copy.reason) == ("sample '7': broken", "7", "broken")
    rows = [{**LLAVA_ROW, "image": "nowhere.png"}]
    data = TrainingData(load_records(write(tmp_path, rows)), processor, on_bad_sample="stop")
    with pytest.raises(BadSampleError, match=r"^sample 'a1': its image cannot be read") as caught:
        list(DataLoader(data, num_workers=1, batch_size=None))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"system": "Be brief."}, "system"),
        ({"video": "a.mp4"}, "video"),
        ({"images": ["one.png"]}, "'image' and 'images'"),
        ({"messages": TURNS}, "'messages' and 'conversations'"),
    ],
)
def test_columns_whose_content_would_be_lost(tmp_path, row, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_records(write(tmp_path, [LLAVA_ROW, {**LLAVA_ROW, **row}]))


def test_other_columns_are_told_once(tmp_path) -> None:
    with pytest.warns(UserWarning, match=r"the columns \['source'\] are not read"):
        load_records(write(tmp_path, [{**LLAVA_ROW, "source": "web"}]))


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"weight": 0}, "weight"),
        ({"from": "gpt"}, "'role' and 'from'"),
        ({"content": [{"type": "text", "text": "a", "citations": 1}]}, "citations"),
        ({"role": ["user"]}, "unknown role"),
    ],
)
def test_fields_of_turns_that_would_be_lost(turn, message) -> None:
    rows = [{"id": "a", "messages": [{**TURNS[0], **turn}, TURNS[1]]}]
    with pytest.raises(BadSampleError, match=message):
        Records(rows)[0]


def test_pictures_inside_their_parts(tmp_path) -> None:
    picture = Image.new("RGB", (8, 8), (1, 2, 3))
    for name, value in (("image", picture), ("path", "a.png"), ("url", "b.png")):
        parts = [{"type": "image", name: value}, {"type": "text", "text": "a"}]
        rows = [{"id": "a", "messages": [{"role": "user", "content": parts}, TURNS[1]]}]
        assert Records(rows)[0].images == [value]
        assert Records(rows).sketch()[1] == [True]
        with pytest.raises(BadSampleError, match="keep them in one place"):
            Records([{**rows[0], "images": ["c.png"]}])[0]


def test_paths_and_encodings(tmp_path, monkeypatch, processor) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, [LLAVA_ROW, {**LLAVA_ROW, "image": "~/one.png"}])
    assert TrainingData(load_records("~/data.json"), processor)[1]["pixel_values"].shape[0] == 1
    assert load_records("~/data.json", "~").folder == tmp_path
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([LLAVA_ROW]).encode())
    assert len(load_records("~/bom.json")) == 1
    (tmp_path / "deep.json").write_text("[" * 200_000)
    for path, more, message in (
        ("~/deep.json", {}, "nested too deeply"),
        ("~/data.json", {"split": "test"}, "split"),
        ("~/data.json", {"image_folder": "~/gone"}, "does not exist"),
        (str(tmp_path), {}, "save_to_disk"),
    ):
        with pytest.raises(ValueError, match=message):
            load_records(path, **more)
    assert os.path.expanduser("~") == str(tmp_path)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_length": 0}, ValueError, "max_length"),
        ({"max_length": 2.5}, TypeError, "max_length"),
        ({"prompt_template": "Q: {}"}, ValueError, "prompt_template"),
    ],
)
def test_settings_that_cannot_be_used(processor, settings, error, message) -> None:
    with pytest.raises(error, match=message):
        TrainingData(two_turns(), processor, **settings)
