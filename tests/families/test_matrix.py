"""The laws that hold for every method on every family, with both attention implementations.

``tests.helpers.matrix.covering`` chooses the methods that stand for the others on a case; ``-m product`` runs the rest.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from mllm_crossget import accelerate_mllm, restore_mllm, trace_merges
from mllm_crossget.families.family import families
from mllm_crossget.hooks.ground.state import handle_of
from tests.helpers.families.cases import Case
from tests.helpers.generation import ENCODES_IMAGES_FIRST, encodes_images_first
from tests.helpers.gradients import checkpoint_activations
from tests.helpers.matrix import CASES, covering, is_first, learned, shared, shared_stock, takes
from tests.helpers.methods import DYNAMIC, METHODS, prepare
from tests.helpers.products import REST, rest_unless
from tests.helpers.versions import TRAINS

GREEDY = {"max_new_tokens": 5, "do_sample": False}
BEAMS = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}


def matrix(*needs: str, lacks: str | None = None, kinds: int | None = None) -> pytest.MarkDecorator:
    """Every method x every case that has what the test needs, those of the first kinds always, or all methods always.
    tests/families/conftest.py orders them by case."""
    return pytest.mark.parametrize(
        ("method", "case"),
        [
            pytest.param(method, case, id=f"{case.name}-{method}", marks=marks)
            for case in wanted(*needs, lacks=lacks)
            for method, marks in marked(case, kinds)
        ],
    )


def wanted(*needs: str, lacks: str | None = None) -> list[Case]:
    cases = [case for case in CASES if all(getattr(case, need) for need in needs)]
    return [case for case in cases if lacks is None or not getattr(case, lacks)]


def marked(case: Case, kinds: int | None) -> list[tuple[str, tuple[pytest.MarkDecorator, ...]]]:
    """The case's methods with their marks. Variants of a model type have the same classes: one kind fewer."""
    taken = [method for method in METHODS if takes(case, method)]
    fewer = 0 if kinds == 1 or is_first(case) else 1
    chosen = taken if kinds is None else covering(case, kinds - fewer) if kinds else []
    return [(method, rest_unless(method in chosen)) for method in taken]


@matrix(kinds=2)
@torch.no_grad()
def test_autocast_runs(method, case) -> None:
    """Half precision where autocast wants it, as in training."""
    stock = shared_stock(case.name)
    batch = case.batch(stock)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            case.answers(stock, batch)
        except RuntimeError as error:
            pytest.skip(f"the untouched model does not run under autocast in this transformers: {error}")
        answers = case.answers(shared(case.name, method), batch)
    assert len(answers) == 3
    assert all(torch.isfinite(found).all() for found in answers)


def test_every_family_has_a_case() -> None:
    assert {case.model_type for case in CASES} == set(families())


@pytest.mark.parametrize(
    "case", [case for case in CASES if not families()[case.model_type].dynamic], ids=lambda c: c.name
)
def test_a_family_with_fixed_counts_refuses_and_says_who_can(case) -> None:
    model = case.build("sdpa")
    for method in sorted(DYNAMIC):
        with pytest.raises(ValueError, match=r"model types that can: .*llava"):
            accelerate_mllm(model, **METHODS[method], **case.dial)
        assert handle_of(model) is None


@pytest.mark.parametrize(
    ("method", "case", "attention"),
    [
        pytest.param(method, case, attention, id=f"{case.name}-{method}-{attention}", marks=marks)
        for case in CASES
        for attention, kinds in (("sdpa", 3), ("eager", 2))
        for method, marks in marked(case, kinds)
    ],
)
@torch.no_grad()
def test_a_row_in_a_batch_equals_the_row_alone(method, case, attention) -> None:
    model = shared(case.name, method) if attention == "sdpa" else learned(case, method, attention)
    batch = case.batch(model)
    together = case.answers(model, batch)
    for index, row in enumerate(together):
        (alone,) = case.answers(model, case.row(batch, index))
        torch.testing.assert_close(row, alone, atol=1e-4, rtol=1e-4)


def one_after_the_other() -> list:
    """Methods, case, attention: those that run always, and all of them."""
    found = []
    for case in CASES:
        every = [method for method in METHODS if takes(case, method)]
        for attention, kinds in (("sdpa", 3), ("eager", 1)):
            chosen = covering(case, kinds if is_first(case) else 1)
            found.append(pytest.param(chosen, case, attention, id=f"{case.name}-{attention}"))
            if set(chosen) < set(every):
                found.append(pytest.param(every, case, attention, id=f"{case.name}-{attention}-every", marks=REST))
    return found


@pytest.mark.parametrize(("methods", "case", "attention"), one_after_the_other())
@torch.no_grad()
def test_restored_bit_for_bit_and_identity_at_one(methods, case, attention) -> None:
    """One model, method after method: each begins with what the one before has left."""
    model = case.build(attention)
    batch = case.batch(model)
    before = case.answers(model, batch)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    for method in methods:
        accelerate_mllm(model, **METHODS[method], keep_ratio=1)
        assert same_answers(case.answers(model, batch), before), f"{method} at keep_ratio=1"
        prepare(model, method=method, **case.dial)
        assert not same_answers(case.answers(model, batch), before), f"{method} changes nothing"
        restore_mllm(model)
        assert same_answers(case.answers(model, batch), before), f"{method}, restored"
        now = model.state_dict()
        assert now.keys() == state.keys(), method
        assert all(torch.equal(now[name], value) for name, value in state.items()), method
        assert [type(module) for module in model.modules()] == kinds, method
        assert not [name for name in vars(model) if "crossget" in name], method


def same_answers(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@matrix("has_vision")
@torch.no_grad()
def test_the_tower_has_the_schedules_tokens(method, case) -> None:
    model = shared(case.name, method)
    with trace_merges(model) as trace:
        case.answers(model, case.batch(model))
    schedule = case.schedule(model) if case.schedule else handle_of(model).schedule
    assert sum(schedule.removals) > 0
    layers = len(schedule.removals)
    if method in DYNAMIC:
        counts = [(entry.size > 0).sum(dim=1) for entry in trace]
        assert [entry.size.shape[1] for entry in trace] == [int(count.max()) for count in counts]
        assert all(
            int(count.max()) <= schedule.tokens[0] for count in counts
        )  # how many: tests/hooks/tower/test_ragged.py
    else:
        assert [entry.size.shape[1] for entry in trace[:layers]] == list(schedule.tokens[1:])
        assert {entry.source.shape[1] for entry in trace[:layers]} == {schedule.tokens[0]}
    for entry in trace[:layers] if case.sizes_differ else trace:
        assert torch.equal(entry.size.sum(dim=1), torch.full_like(entry.size[:, 0], entry.source.shape[1]))


@matrix("loss", kinds=2)
def test_gradient_checkpointing_changes_no_gradient(method, case) -> None:
    model = learned(case, method)
    batch = case.batch(model)
    model.train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        case.loss(model, batch).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    checkpoint_activations(model, reentrant=False)
    found = gradients()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # A replayed layer may round in another order: 1.01e-6 was seen.
        torch.testing.assert_close(found[name], gradient, atol=5e-6, rtol=1e-4, msg=name)
    crossed = [name for name in expected if "cross_tokens" in name]
    assert bool(crossed) == handle_of(model).schedule.cross
    absent = [  # the tower of a modality that is not in the batch: in the graph, with a gradient of zero
        handle_of(model).modality_towers[modality.name].encoder_path
        for modality in families()[case.model_type].modalities
        if modality.name in handle_of(model).modality_towers and modality.pixels not in batch
    ]
    learning = [name for name in crossed if not name.startswith(tuple(absent))]
    assert all(expected[name].abs().sum() > 0 for name in learning)


def new_tokens(model: nn.Module, batch: dict, options: dict) -> list[list[int]]:
    """Generated tokens of every row, without the prompt and without padding at the end."""
    sequences = model.generate(**batch, **options)
    encodes = getattr(model.config, "text_config", model.config).is_encoder_decoder
    prompt = batch["input_ids"].shape[1] if "input_ids" in batch and not encodes else 0
    return [strip(row, model.generation_config.pad_token_id) for row in sequences[:, prompt:].tolist()]


def strip(row: list[int], pad: int) -> list[int]:
    while row and row[-1] == pad:
        row = row[:-1]
    return row


def alone(model: nn.Module, case: Case, batch: dict, options: dict, rows: int) -> list[list[int]]:
    return [new_tokens(model, case.row(batch, row), options)[0] for row in range(rows)]


@pytest.mark.parametrize(
    ("method", "case", "options"),
    [
        pytest.param(method, case, options, id=f"{case.name}-{method}-{name}", marks=marks)
        for case in wanted("generates", lacks="expected" if ENCODES_IMAGES_FIRST else None)
        for name, options, kinds in (("greedy", GREEDY, 3), ("beams", BEAMS, 2 if is_first(case) else 0))
        for method, marks in marked(case, kinds)
    ],
)
@torch.no_grad()
def test_generate_says_the_same_in_a_batch_and_alone(method, case, options) -> None:
    """Cases with an oracle: the next test."""
    if options is BEAMS and case.name.startswith(("glm", "minicpm")) and not TRAINS:
        pytest.skip("this transformers counts the images of beams by marks around them: the untouched model fails, too")
    model = shared(case.name, method)
    batch = case.batch(model)
    together = new_tokens(model, batch, options)
    assert any(together)
    assert together == alone(model, case, batch, options, len(together))


def with_an_oracle() -> list:
    """Methods without a learned token: one of both ways to number positions, in turns. Beams with kept positions repeat
    rows that are compact already: one family in four."""
    found = []
    for number, case in enumerate(wanted("expected")):
        keeps = families()[case.model_type].positions == "grid"  # positions in a grid are kept anyway
        for method, marks in marked(case, 3):
            plain = method in ("tome", "random")
            for positions in (None,) if keeps else (None, "original"):
                for name, options in (("greedy", GREEDY), ("beams", BEAMS)):
                    beams = is_first(case) and not plain and (positions is None or number % 4 == 0)
                    runs = options is GREEDY or beams
                    if plain and not keeps:
                        runs = runs and (positions is None) == (method == "tome")
                    only = () if options is GREEDY else (encodes_images_first,)
                    name_of = f"{case.name}-{method}-{name}-{positions}"
                    both = (*(marks or rest_unless(runs)), *only)
                    found.append(pytest.param(method, case, options, positions, id=name_of, marks=both))
    return found


@pytest.mark.parametrize(("method", "case", "options", "positions"), with_an_oracle())
@torch.no_grad()
def test_generate_equals_prompts_compacted_by_hand(method, case, options, positions) -> None:
    """In a batch, and greedily alone: the oracle works row by row."""
    if options is BEAMS and case.name == "llama4":
        pytest.skip("the untouched model does not repeat the images of beams")
    model = shared(case.name, method, positions)
    batch = case.batch(model)
    expected = [
        strip(row, model.generation_config.pad_token_id)
        for row in case.expected(deepcopy(shared_stock(case.name)), model, batch, **options)  # oracles leave hooks
    ]
    assert any(expected)
    assert new_tokens(model, batch, options) == expected
    if positions is None and options is GREEDY:
        assert alone(model, case, batch, options, len(expected)) == expected
