"""Slow, obvious versions of every operation: one image at a time, one token at a time, float64 where it matters.

The fast code of ``mllm_crossget.ops`` is compared with these. T tokens, D width, H heads, L layers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

NOTHING = -math.inf


class Decision(NamedTuple):
    """Sources (ascending), the destination of each, and the survivors in the order of the output."""

    src: list[int]
    dst: list[int]
    kept: list[int]


def cosine(a: list[float], b: list[float]) -> float:
    """Cosine similarity; 0 for a vector of zeros."""
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return dot / norms if norms else 0.0


def complete_graph_matching(keys_TD: Tensor, importance_T: Tensor, r: int, protected: set[int]) -> Decision:
    """CrossGET's matching of one image. Equal values: the lower index first."""
    keys, importance = keys_TD.double().tolist(), importance_T.double().tolist()
    tokens = range(len(keys))
    free = [i for i in tokens if i not in protected]

    def similarity(i: int, j: int) -> float:
        low, high = min(i, j), max(i, j)
        return NOTHING if i == j or i in protected or j in protected else cosine(keys[low], keys[high])

    best = {i: max((similarity(i, j) for j in free if j != i), default=NOTHING) for i in free}
    ranking = sorted(free, key=lambda i: -best[i])  # sorted is stable
    score = {}
    for place, i in enumerate(ranking):
        below = ranking[place + 1 :]
        score[i] = importance[i] - max(similarity(i, j) for j in below) if below else math.inf
    src = sorted(sorted(free, key=lambda i: score[i])[:r])
    kept = [i for i in tokens if i not in src]
    dst = []
    for i in src:
        choice = None
        for j in kept:
            if j not in protected and (choice is None or similarity(i, j) > similarity(i, choice)):
                choice = j
        dst.append(choice)
    return Decision(src, dst, kept)


def bipartite_matching(
    metric_TD: Tensor, r: int, class_token: bool = False, distill_token: bool = False, keep_order: bool = False
) -> Decision:
    """ToMe's matching of one image."""
    metric = metric_TD.double().tolist()
    even, odd = list(range(0, len(metric), 2)), list(range(1, len(metric), 2))
    receivers = odd[1:] if distill_token else odd
    proposals = {}
    for i in even:
        if class_token and i == 0:
            proposals[i] = (NOTHING, None)
            continue
        partner = None
        for j in receivers:
            if partner is None or cosine(metric[i], metric[j]) > cosine(metric[i], metric[partner]):
                partner = j
        proposals[i] = (cosine(metric[i], metric[partner]), partner)
    by_similarity = sorted(even, key=lambda i: -proposals[i][0])
    src, unmerged = sorted(by_similarity[:r]), by_similarity[r:]
    if keep_order or r == 0:
        kept = [i for i in range(len(metric)) if i not in src]
    else:
        unmerged = sorted(unmerged) if class_token else unmerged
        kept = unmerged + odd
        if distill_token:
            kept = [unmerged[0], odd[0], *unmerged[1:], *odd[1:]]
    return Decision(src, [proposals[i][1] for i in src], kept)


def pair_weights(importance_T: Tensor, decision: Decision) -> list[tuple[float, float]]:
    """Softmax over the importance of a source and of its destination."""
    pairs = []
    for i, d in zip(decision.src, decision.dst, strict=True):
        a, b = math.exp(importance_T[i].item()), math.exp(importance_T[d].item())
        pairs.append((a / (a + b), b / (a + b)))
    return pairs


def ensemble_merge(
    x_TD: Tensor, size_T: Tensor, decision: Decision, weights: list[tuple[float, float]]
) -> tuple[Tensor, Tensor]:
    """CrossGET's importance-weighted merge of one image."""
    scaled = [x_TD[i] * size_T[i] for i in range(len(x_TD))]
    values, sizes = [], []
    for survivor in decision.kept:
        value, size = scaled[survivor], size_T[survivor]
        for (alpha, beta), i, d in zip(weights, decision.src, decision.dst, strict=True):
            if d == survivor:
                value = value + 2 * alpha * scaled[i] + (2 * beta - 1) * scaled[survivor]
                size = size + size_T[i]
        values.append(value / size)
        sizes.append(size)
    return torch.stack(values), torch.stack(sizes)


def mean_merge(x_TD: Tensor, size_T: Tensor, decision: Decision) -> tuple[Tensor, Tensor]:
    """ToMe's size-weighted mean of one image."""
    values, sizes = [], []
    for survivor in decision.kept:
        members = [survivor, *(i for i, d in zip(decision.src, decision.dst, strict=True) if d == survivor)]
        size = torch.stack([size_T[i] for i in members]).sum()
        values.append(torch.stack([x_TD[i] * size_T[i] for i in members]).sum(dim=0) / size)
        sizes.append(size)
    return torch.stack(values), torch.stack(sizes)


def attention_map(query_HTD: Tensor, key_HTD: Tensor, scaling: float, bias_T: Tensor | None) -> Tensor:
    """(H, T, T) softmax over keys."""
    logits = torch.einsum("hqd,hkd->hqk", query_HTD.double(), key_HTD.double()) * scaling
    if bias_T is not None:
        logits = logits + bias_T.double()
    return logits.exp() / logits.exp().sum(dim=-1, keepdim=True)


def attention_importance(attention_HTT: Tensor, cross_token: bool) -> Tensor:
    """(T,) attention that every token receives: mean over queries and heads; plus the whole of a cross token's row."""
    heads, tokens, _ = attention_HTT.shape
    importance = torch.zeros(tokens, dtype=torch.float64)
    for token in range(tokens):
        for head in range(heads):
            received = [attention_HTT[head, query, token].item() for query in range(tokens)]
            if cross_token:
                importance[token] += sum(received[:-1]) / (tokens - 1) + received[-1]
            else:
                importance[token] += sum(received) / tokens
    return importance / heads


def cosine_importance(key_TC: Tensor, query_C: Tensor) -> Tensor:
    return torch.tensor([cosine(key, query_C.double().tolist()) for key in key_TC.double().tolist()])


def origin(tokens: int, decisions: list[Decision]) -> list[int]:
    """The final row of every original token after several merges."""
    row = list(range(tokens))
    for decision in decisions:
        went = dict(zip(decision.src, decision.dst, strict=True))
        row = [decision.kept.index(went.get(place, place)) for place in row]
    return row


def unmerge(x_TD: Tensor, rows: list[int]) -> Tensor:
    return torch.stack([x_TD[row] for row in rows])


def layer_repeats(vision_layers: int, text_layers: int) -> list[int]:
    """Text layer t is compared with the vision layer at the same relative depth."""
    repeats = [0] * vision_layers
    for t in range(text_layers):
        repeats[next(i for i in range(vision_layers) if (i + 1) * text_layers // vision_layers > t)] += 1
    return repeats


def alignment_loss(
    vision_LND: Tensor, text_LBD: Tensor, rows: list[int], kl: str = "reference"
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, vision term and text term: one text layer and one image at a time."""
    vision_of_text = []
    for layer, times in enumerate(layer_repeats(len(vision_LND), len(text_LBD))):
        vision_of_text += [layer] * times
    vision_term = text_term = torch.zeros((), dtype=torch.float64)
    for text_layer, vision_layer in enumerate(vision_of_text):
        for image, row in enumerate(rows):
            p = vision_LND[vision_layer, image].double().softmax(dim=-1)
            q = text_LBD[text_layer, row].double().softmax(dim=-1)
            m = (p + q) / 2
            if kl == "js":
                vision_term = vision_term + (p * (p / m).log()).sum()
                text_term = text_term + (q * (q / m).log()).sum()
            else:
                vision_term = vision_term + (m * (m / p).log()).sum()
                text_term = text_term + (m * (m / q).log()).sum()
    count = len(vision_of_text) * len(rows)
    return (vision_term + text_term) / (2 * count), vision_term / count, text_term / count


def token_counts(patches: int, prefix: int, layers: int, r: int, cross: bool) -> list[int]:
    """Tokens in front of the first layer and after every layer for the same ``r`` in each."""
    counts = [prefix + patches + (1 if cross else 0)]
    for _ in range(layers):
        free = counts[-1] - prefix - (1 if cross else 0)
        counts.append(counts[-1] - min(r, free // 2))
    return counts


def pruning_importance(attention_HTT: Tensor, output_THD: Tensor, alignment_NK: Tensor | None, width: int) -> Tensor:
    """MADTP's importance of one image's tokens behind the class token, in float64."""
    attention, output = attention_HTT.double(), output_THD.double()
    heads, tokens, _ = attention.shape
    patches = range(1, tokens)
    received = [sum(max(attention[h, i, j].item() for h in range(heads)) for i in patches) for j in patches]
    terms = [[value / (sum(received) + 1e-8) for value in received]]
    classes = []
    for j in patches:
        lengths = [output[j, h].norm().item() for h in range(heads)]
        classes.append(sum(attention[h, 0, j].item() * lengths[h] / sum(lengths) for h in range(heads)))
    terms.append(classes)
    if alignment_NK is not None:
        best = [math.exp(max(row) / math.sqrt(width)) for row in alignment_NK.double().tolist()]
        terms.append([value / sum(best) for value in best])
    return torch.tensor([sum(values) / len(terms) for values in zip(*terms, strict=True)], dtype=torch.float64)


def pruning_threshold(importance_N: Tensor, alignment_NK: Tensor | None, temperature: float) -> float:
    """MADTP's threshold of one image: the mean importance that an alignment token sees, for the one that sees least."""
    if alignment_NK is None:
        return importance_N.double().mean().item()
    seen = []
    for column in alignment_NK.double().T:
        weights = (column / temperature).exp()
        seen.append((weights * importance_N.double()).sum().item() / weights.sum().item())
    return min(seen)


def pool_least_important(x_ND: Tensor, importance_N: Tensor, leaving: int) -> Tensor:
    """The tokens that stay in their order, then the mean by importance of the ``leaving`` least important ones."""
    by_importance = sorted(range(len(x_ND)), key=lambda i: importance_N[i].item())
    pooled = by_importance[:leaving]
    kept = [x_ND[i] for i in range(len(x_ND)) if i not in pooled]
    if not pooled:
        return x_ND
    total = sum(importance_N[i].item() for i in pooled)
    return torch.stack([*kept, sum(x_ND[i] * (importance_N[i].item() / total) for i in pooled)])


def guidance(image_LND: list[Tensor], text_LND: list[Tensor], space_KD: Tensor) -> float:
    """MADTP's alignment loss of one image and its text, in float64.

    Both sides are lists, by layer, of tokens in the alignment tokens' space.
    """
    space = space_KD.double()

    def found(layers: list[Tensor], k: int) -> Tensor:
        total = torch.zeros(space.shape[1], dtype=torch.float64)
        for tokens in layers:
            weights = [math.exp((token @ space[k]).item() / math.sqrt(len(token))) for token in tokens.double()]
            for weight, token in zip(weights, tokens.double(), strict=True):
                total += weight / sum(weights) * token
        return total

    apart = []
    for k in range(len(space)):
        image, text = found(image_LND, k), found(text_LND, k)
        apart.append(1 - (image @ text).item() / (image.norm() * text.norm()).item())
    return sum(apart) / len(apart)


def attention_with_repeated_keys(query: Tensor, key: Tensor, value: Tensor, size: Tensor, causal: bool) -> Tensor:
    """(B, H, T, D) attention in which every key and value stands as often as its token's size (B, T), written out."""
    rows = []
    for image in range(len(query)):
        owner = torch.arange(size.shape[1]).repeat_interleave(size[image])
        keys, values = key[image][:, owner], value[image][:, owner]
        logits = query[image] @ keys.transpose(-1, -2) / query.shape[-1] ** 0.5
        if causal:
            logits = logits.masked_fill(owner > torch.arange(size.shape[1])[:, None], -torch.inf)
        rows.append(logits.softmax(dim=-1) @ values)
    return torch.stack(rows)
