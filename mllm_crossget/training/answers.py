"""How an answer ends, and whether its words are known: what the labels teach beside the words themselves.

A model that never sees an end mark in its labels does not learn to stop. Chat templates mark the assistant's words with
``{% generation %}``, and some (the published LLaVA-1.5's) write the end mark behind them or not at all.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from mllm_crossget.training.records import BadSampleError, Records

_LOOKED_AT = 1000  # samples, spread over the data
_SHOWN = 5


def with_end_marks(ids: list[int], learned: list[int], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Give every answer an end mark that is learned.

    One that the template wrote inside the marks stays as it is. One that it wrote right behind them is learned too.
    Where there is none, the tokenizer's own is put behind the answer's last word; blanks behind it are not learned.

    Args:
        ids: of a sample.
        learned: 1 where the assistant's words are, else 0.
        tokenizer: says which tokens are marks; without an end mark of its own nothing changes.

    Returns:
        Both lists, longer by the marks that were put in.
    """
    end = tokenizer.eos_token_id
    if end is None:
        return ids, learned
    marks, ids, learned = _marks(tokenizer), list(ids), list(learned)
    for start, stop in reversed(_spans(learned)):  # from the last on, so that places in front stay what they are
        words = start + _without_blanks(ids[start:stop], tokenizer)
        if words == start or ids[words - 1] in marks:
            continue
        behind = _end_behind(ids, stop, end, tokenizer)
        if behind is not None:
            learned[stop:behind] = [1] * (behind - stop)
            continue
        learned[words:stop] = [1] + [0] * (stop - words)
        ids.insert(words, end)
    return ids, learned


def _spans(learned: list[int]) -> list[tuple[int, int]]:
    """Start and stop of every run of ones."""
    spans, start = [], 0
    for value, group in itertools.groupby(learned):
        stop = start + len(list(group))
        if value:
            spans.append((start, stop))
        start = stop
    return spans


def unknown_words(records: Records, tokenizer: Any) -> str | None:
    """What to warn of if words of the data are none of the tokenizer's, so that they are read and learned as one and
    the same token; None if there are no such words, or no such token."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return None
    texts: dict[str, list[str]] = {"user": [], "assistant": []}
    for index in range(0, len(records), max(1, len(records) // _LOOKED_AT)):
        try:
            record = records[index]
        except BadSampleError:  # told when it is asked for
            continue
        for message in record.messages:
            words = " ".join(part["text"] for part in message["content"] if part["type"] == "text")
            if message["role"] in texts and words:
                texts[message["role"]].append(words)
    strange = {role: [text for text in told if _has(text, unknown, tokenizer)] for role, told in texts.items()}
    if not any(strange.values()):
        return None
    shares = [f"{len(strange[role]) / max(1, len(texts[role])):.0%} of the {name}"
              for role, name in (("user", "questions"), ("assistant", "answers"))]  # fmt: skip
    counted = Counter(word for told in strange.values() for text in told for word in text.split())
    odd = [word for word, _ in counted.most_common(50) if _has(word, unknown, tokenizer)][:_SHOWN]
    return (
        f"{' and '.join(shares)} hold words that the tokenizer does not know; they are trained as "
        f"{tokenizer.unk_token!r}" + (f": {', '.join(odd)}" if odd else "")
    )


def _marks(tokenizer: Any) -> set[int]:
    """Special tokens, the end mark among them, but for the one that stands for unknown words."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
    return special - {tokenizer.unk_token_id} | {tokenizer.eos_token_id}


def _without_blanks(span: list[int], tokenizer: Any) -> int:
    """Tokens of a span without the blank ones at its end."""
    count = len(span)
    while count and not tokenizer.decode([span[count - 1]]).strip():
        count -= 1
    return count


def _end_behind(ids: list[int], start: int, end: int, tokenizer: Any) -> int | None:
    """The place behind an end mark that follows at ``start``, with blanks at most in front of it, or None."""
    for place in range(start, len(ids)):
        if ids[place] == end:
            return place + 1
        if tokenizer.decode([ids[place]]).strip():
            return None
    return None


def _has(text: str, unknown: int, tokenizer: Any) -> bool:
    return unknown in tokenizer(text, add_special_tokens=False)["input_ids"]
