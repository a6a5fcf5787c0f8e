"""Answers of a server's chat endpoint to the requests of ``vllm_equality.py``, with pictures in base64."""

from __future__ import annotations

import base64
import io
import json
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mllm_crossget.integrations.vllm.comparison import Answer, Request

_AT_ONCE, _SECONDS = 8, 120


def answers_over_http(url: str, requests: Sequence[Request], new_tokens: int = 24) -> list[Answer]:
    """Answers of a server's chat endpoint, eight requests at a time, with pictures in base64.

    Args:
        url: of the server, such as ``http://localhost:8000/v1``.
        requests: what to answer.
        new_tokens: largest number of tokens of an answer.
    """
    with urllib.request.urlopen(f"{url}/models", timeout=_SECONDS) as reply:
        served = json.load(reply)["data"][0]["id"]

    def ask(request: Request) -> Answer:
        text = request.text.removeprefix("USER: ").removesuffix(" ASSISTANT:").replace("<image>\n", "")
        parts = [_picture(image) for image in request.images] + [{"type": "text", "text": text}]
        body = {
            "model": served,
            "messages": [{"role": "user", "content": parts}],
            "temperature": 0,
            "max_tokens": new_tokens,
            "add_special_tokens": True,
            "return_token_ids": True,
        }
        words = json.dumps(body).encode()
        call = urllib.request.Request(f"{url}/chat/completions", words, {"Content-Type": "application/json"})
        with urllib.request.urlopen(call, timeout=_SECONDS) as reply:
            answer = json.load(reply)
        return Answer(tuple(answer["choices"][0]["token_ids"]), answer["usage"]["prompt_tokens"])

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(ask, requests))


def _picture(image: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}
