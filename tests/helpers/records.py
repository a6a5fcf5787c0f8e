"""Records of training data as users write them."""

from __future__ import annotations

import json

from PIL import Image

QUESTION, ANSWER = "Which digit is red?", "5"


LLAVA_ROW = {
    "id": "a1",
    "image": "one.png",
    "conversations": [
        {"from": "human", "value": f"<image>\n{QUESTION}"},
        {"from": "gpt", "value": ANSWER},
        {"from": "human", "value": "How many digits are there?"},
        {"from": "gpt", "value": "2"},
    ],
}


def picture(size=(96, 96), colour=(200, 30, 30)):
    return Image.new("RGB", size, colour)


def write(folder, rows, name="data.json"):
    picture().save(folder / "one.png")
    text = "\n".join(json.dumps(row) for row in rows) if name.endswith("l") else json.dumps(rows)
    (folder / name).write_text(text)
    return folder / name
