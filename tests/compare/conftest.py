"""Questions about the embedded model's held-out scenes, as a user's file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mllm_crossget.embedded import held_out_questions

ASKED = 9


def turns(text: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine questions about two scenes, one of them in a second turn, and a sample without a picture."""
    folder = tmp_path_factory.mktemp("compare")
    rows = [{"id": "text", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}]
    questions = held_out_questions(ASKED)
    for index, question in enumerate(questions[:-1]):
        name = f"{question.scene_index}.png"
        question.image.save(folder / name)
        rows.append({"id": f"q{index}", "image": name, "conversations": turns(question.text, question.answer)})
    rows[1]["conversations"] += [{"from": "human", "value": questions[1].text}, {"from": "gpt", "value": "7"}]
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"
