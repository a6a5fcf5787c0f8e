"""Golden single steps: CrossGET in its LLaVA and CLIP flavours, and ToMe."""

import pytest
import torch

from mllm_crossget import ToMeConfig
from mllm_crossget.ops import (
    bipartite_soft_matching,
    complete_graph_soft_matching,
    cosine_importance,
    merge,
    unmerge,
)
from mllm_crossget.ops.guidance.importance import importance_of_map
from mllm_crossget.schedule import TowerGeometry, make_schedule, ramp, removable
from tests.golden.files import STEP, Golden, cases


def expect_match(golden, name, match):
    golden.expect(f"{name}.src_sorted", match.src, STEP)
    golden.expect(f"{name}.dst_of_src", match.dst, STEP)
    golden.expect(f"{name}.kept_sorted", match.kept, STEP)
    golden.expect(f"{name}.weight_sorted", match.weight, STEP)


def check_llava_step(golden, name):
    x, size = golden.input(f"{name}.x"), golden.input(f"{name}.token_size")
    attention, keys = golden.input(f"{name}.attn_mean_T").mT, golden.input(f"{name}.keys_mean")
    tokens, class_token = x.shape[1], golden.number(f"{name}.class_token")
    counted, r = golden.number(f"{name}.protected"), golden.number(f"{name}.r")
    if r == 0:  # nothing is computed, nothing changes
        golden.expect(f"{name}.x_out", x, 0.0)
        golden.expect(f"{name}.token_size_out", size, 0.0)
        return
    r_eff = min(r, removable(tokens, 1 + class_token if counted < 0 else counted))
    golden.expect(f"{name}.r_eff", torch.tensor(r_eff), STEP)
    importance = importance_of_map(attention[:, None], cross_token=True)
    golden.expect(f"{name}.importance", importance[..., None], STEP)
    match = complete_graph_soft_matching(keys, importance, r_eff, (0, tokens - 1) if class_token else (0,))
    expect_match(golden, name, match)
    merged, new_size = merge(x, size[..., 0], match)
    golden.expect(f"{name}.x_out", merged, STEP)
    golden.expect(f"{name}.token_size_out", new_size[..., None], STEP)


def check_clip_vision_step(golden, name):
    x, query, key = (golden.input(f"{name}.{part}").transpose(0, 1) for part in ("x", "query", "key"))
    size, class_token = golden.input(f"{name}.token_size"), golden.number(f"{name}.class_token")
    tokens, r = x.shape[1], golden.number(f"{name}.r")
    if r == 0:
        golden.expect(f"{name}.x_out", x.transpose(0, 1), 0.0)
        golden.expect(f"{name}.token_size_out", size, 0.0)
        return
    r_eff = min(r, removable(tokens, 2 * class_token))
    golden.expect(f"{name}.r_eff", torch.tensor(r_eff), STEP)
    importance = cosine_importance(key, query[:, -1])
    golden.expect(f"{name}.importance", importance[..., None], STEP)
    match = complete_graph_soft_matching(key, importance, r_eff, (0, tokens - 1) if class_token else ())
    expect_match(golden, name, match)
    merged, new_size = merge(x, size[..., 0], match)
    golden.expect(f"{name}.x_out", merged.transpose(0, 1), STEP)
    golden.expect(f"{name}.token_size_out", new_size[..., None], STEP)


def check_clip_text_step(golden, name):
    """Two steps; the second takes ids and sizes of the first. The end token is protected wherever a row has it."""
    r, vocab = golden.number(f"{name}.r"), golden.number(f"{name}.vocab")
    ids, size = golden.input(f"{name}.token_id").float(), golden.input(f"{name}.token_size")[..., 0]
    assert (ids.amax(dim=1) == vocab - 1).all()
    for step in (f"{name}.step0", f"{name}.step1"):
        golden.expect(f"{step}.token_id_in", ids, STEP)
        golden.expect(f"{step}.token_size_in", size[..., None], STEP)
        x, query, key = (golden.input(f"{step}.{part}").transpose(0, 1) for part in ("x", "query", "key"))
        rows, tokens, end = torch.arange(len(x)), x.shape[1], ids.argmax(dim=1)
        golden.expect(f"{step}.eot_pos", end, STEP)
        importance = cosine_importance(key, query[rows, end])
        golden.expect(f"{step}.importance", importance[..., None], STEP)
        protected = torch.zeros(len(x), tokens, dtype=torch.bool)
        protected[:, 0] = protected[:, -1] = protected[rows, end] = True
        match = complete_graph_soft_matching(key, importance, min(r, removable(tokens, 3)), protected)
        expect_match(golden, step, match)
        merged, new_size = merge(x, size, match)
        golden.expect(f"{step}.x_out", merged.transpose(0, 1), STEP)
        ids = merge(ids[..., None], size, match._replace(weight=None))[0][..., 0]
        size = new_size
        golden.expect(f"{step}.token_id_out", ids, STEP)
        golden.expect(f"{step}.eot_pos_out", ids.argmax(dim=1), STEP)
        golden.expect(f"{step}.token_size_out", size[..., None], STEP)


def check_tome_step(golden, name):
    metric, x, size = (golden.input(f"{name}.{part}") for part in ("metric", "x", "size"))
    class_token, distill_token = (bool(golden.number(f"{name}.{kind}_token")) for kind in ("class", "distill"))
    r = min(golden.number(f"{name}.r"), removable(x.shape[1], class_token + distill_token))
    match = bipartite_soft_matching(metric, r, class_token, distill_token)
    ones = torch.ones_like(size[..., 0])
    mean, count = merge(x, ones, match)
    golden.expect(f"{name}.merge_mean", mean, STEP)
    golden.expect(f"{name}.merge_sum", mean * count[..., None], STEP)
    golden.expect(f"{name}.wavg_x_nosize", mean, STEP)
    golden.expect(f"{name}.wavg_size_nosize", count[..., None], STEP)
    weighted, new_size = merge(x, size[..., 0], match)
    golden.expect(f"{name}.wavg_x", weighted, STEP)
    golden.expect(f"{name}.wavg_size", new_size[..., None], STEP)
    adjacency = torch.nn.functional.one_hot(match.slot, mean.shape[1]).mT
    golden.expect(f"{name}.adjacency", adjacency.float(), 0.0)
    rows = reference_rows(match) if distill_token else match.slot
    golden.expect(f"{name}.unmerge_of_mean", unmerge(mean, rows), STEP)


def reference_rows(match):
    """The reference's unmerge does not know that a distillation token was moved in front of the other odd tokens: it
    reads the rows as if the odd tokens still followed all the even ones. Ours does not repeat that."""
    unmerged = (match.kept % 2 == 0).sum(dim=1)[0]
    place = torch.arange(match.kept.shape[1])
    place[1], place[2 : unmerged + 1] = unmerged, torch.arange(1, unmerged)
    return place[match.slot]


def check_tome_schedule(golden, name):
    layers = golden.number(f"{name}.layers")
    if f"{name}.list" in golden:
        removals = ramp(layers, golden.input(f"{name}.list").tolist())
    else:
        removals = ramp(layers, golden.number(f"{name}.r"), golden.input(f"{name}.inflect").item())
    geometry = TowerGeometry(patches=100 * layers, prefix=1, layers=layers, read=layers)
    golden.expect(f"{name}.result", torch.tensor(make_schedule(ToMeConfig(r=removals), geometry).removals), STEP)


CHECKS = {
    "a_llava_reducer": {r"(case|worked)\d+": check_llava_step},
    "b_clip_reducer": {r"vision\d+": check_clip_vision_step, r"text\d+": check_clip_text_step},
    "f_tome": {r"case\d+": check_tome_step, r"schedule\d+": check_tome_schedule},
}
FILES = {file: [(check, cases(file, pattern)) for pattern, check in checks.items()] for file, checks in CHECKS.items()}


@pytest.mark.parametrize(
    ("file", "check", "name"),
    [
        pytest.param(file, check, name, id=f"{file}-{name}")
        for file, checks in FILES.items()
        for check, names in checks
        for name in names
    ],
)
def test_step(file, check, name):
    check(Golden(file), name)


@pytest.mark.parametrize("file", FILES)
def test_every_tensor_is_compared(file):
    golden = Golden(file)
    for check, names in FILES[file]:
        for name in names:
            check(golden, name)
    assert golden.unused() == []
