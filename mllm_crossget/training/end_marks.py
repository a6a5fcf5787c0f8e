"""End marks of answers in the labels, and words that the tokenizer does not know.

A model that never sees an end mark in its labels does not learn to stop. Chat templates enclose the assistant's words
in ``{% generation %}``. Some of them (the published one of LLaVA-1.5) write the end mark after this block or not at
all.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from mllm_crossget.files.records import BadSampleError, Records

_LOOKED_AT = 1000  # number of samples that are checked, spread over the data
_SHOWN = 5


def with_end_marks(ids: list[int], learned: list[int], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Give every answer an end mark that is part of the labels.

    An end mark inside the template's generation block is kept as it is. An end mark right after the block is made part
    of the labels. If there is none, the tokenizer's own is put after the answer's last word, and blanks after it are
    removed from the labels.

    Args:
        ids: token ids of a sample.
        learned: 1 for the assistant's words, else 0.
        tokenizer: its special tokens are the marks; if it has no end mark, nothing changes.

    Returns:
        Both lists, longer by the added marks.
    """
    end = tokenizer.eos_token_id
    if end is None:
        return ids, learned
    marks, ids, learned = _marks(tokenizer), list(ids), list(learned)
    for start, stop in reversed(_spans(learned)):  # from the last on, so that earlier indices do not change
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
    """A warning if the tokenizer does not know words of the data, so that all of them become the same token. None if
    there are no such words, or no such token."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return None
    texts: dict[str, list[str]] = {"user": [], "assistant": []}
    for index in range(0, len(records), max(1, len(records) // _LOOKED_AT)):
        try:
            record = records[index]
        except BadSampleError:  # reported when the sample is used
            continue
        for message in record.messages:
            words = " ".join(part["text"] for part in message["content"] if part["type"] == "text")
            if message["role"] in texts and words:
                texts[message["role"]].append(words)
    unknown_texts = {
        role: [text for text in texts_of_role if _has(text, unknown, tokenizer)]
        for role, texts_of_role in texts.items()
    }
    if not any(unknown_texts.values()):
        return None
    shares = [f"{len(unknown_texts[role]) / max(1, len(texts[role])):.0%} of the {name}"
              for role, name in (("user", "questions"), ("assistant", "answers"))]  # fmt: skip
    counted = Counter(
        word for texts_of_role in unknown_texts.values() for text in texts_of_role for word in text.split()
    )
    odd = [word for word, _ in counted.most_common(50) if _has(word, unknown, tokenizer)][:_SHOWN]
    return (
        f"{' and '.join(shares)} hold words that the tokenizer does not know; they are trained as "
        f"{tokenizer.unk_token!r}" + (f": {', '.join(odd)}" if odd else "")
    )


def _marks(tokenizer: Any) -> set[int]:
    """Special tokens, including the end mark, without the token for unknown words."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
    return special - {tokenizer.unk_token_id} | {tokenizer.eos_token_id}


def _without_blanks(span: list[int], tokenizer: Any) -> int:
    """Number of tokens of a span without the blank ones at its end."""
    count = len(span)
    while count and not tokenizer.decode([span[count - 1]]).strip():
        count -= 1
    return count


def _end_behind(ids: list[int], start: int, end: int, tokenizer: Any) -> int | None:
    """The index after an end mark that follows at ``start``, with only blanks before it; or None."""
    for place in range(start, len(ids)):
        if ids[place] == end:
            return place + 1
        if tokenizer.decode([ids[place]]).strip():
            return None
    return None


def _has(text: str, unknown: int, tokenizer: Any) -> bool:
    return unknown in tokenizer(text, add_special_tokens=False)["input_ids"]
