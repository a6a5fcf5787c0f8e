"""Decoding under torch.compile: one graph, no break. The prefill may break; only the steps after it are many."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import StaticCache
from transformers.generation import CompileConfig

from mllm_crossget import accelerate_mllm
from tests.helpers.generation import FEATURES, Case, make_case
from tests.helpers.oracle import assert_says
from tests.helpers.products import rest_unless
from tests.helpers.tiny import prompt_batch, randomise_cross_tokens, tiny_llava

NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


pytestmark = pytest.mark.filterwarnings("error:Dynamo")


@pytest.fixture(autouse=True)
def _clean_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counting_backend():
    """The graphs that a backend was given, and the backend, which runs them as they are."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _):
        graphs.append(graph)
        return graph.forward

    return graphs, backend


KINDS = [("crossget", "contiguous"), ("crossget", "original"), ("crossget-dynamic", "contiguous"),
         ("tome", "contiguous")]  # fmt: skip
"""What the language model's layers do differently: a cross token or none, either positions, counts per image."""


def kinds(*names: str) -> pytest.MarkDecorator:
    """The compiled step is the same in both tests: each kind runs always in one of them."""
    cases = [pytest.param(kind, id="-".join(kind), marks=rest_unless("-".join(kind) in names)) for kind in KINDS]
    return pytest.mark.parametrize("any_case", cases, indirect=True)


@pytest.fixture
def any_case(request: pytest.FixtureRequest) -> Case:
    method, positions = request.param
    return make_case(method, text_layers=2, visual_tokens=FEATURES, positions=positions)


@kinds("crossget-original", "crossget-dynamic-contiguous")
def test_compiled_decode_with_a_static_cache_is_one_unbroken_graph(any_case: Case) -> None:
    model, batch = any_case.model, prompt_batch(any_case.model, (2, 0, 1))
    expected = any_case.oracle.new_tokens(model, batch, **GREEDY)
    lengths = torch.tensor([len(row.ids) for row in any_case.oracle.rows(model, batch)])
    length = int(lengths.max()) + NEW
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length)
    mask = batch["attention_mask"]
    with torch.no_grad():
        output = model(**batch, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache, use_cache=True)
        graphs, backend = counting_backend()
        step = torch.compile(model.__call__, backend=backend, fullgraph=True)
        tokens = []
        for _ in range(NEW):
            logits = output.logits[:, -1].clone()
            logits[:, model.config.image_token_id] = -float("inf")
            tokens.append(logits.argmax(dim=-1, keepdim=True))
            output = _step(lengths, step, tokens, cache, batch)
    assert torch.cat(tokens, dim=1).tolist() == expected
    assert len(graphs) == 1


@kinds("crossget-contiguous", "tome-contiguous")
def test_generate_compiles_its_decode_steps(any_case: Case) -> None:
    """generate's own compilation (static cache), forced onto the CPU with a backend that compiles nothing."""
    model, batch = any_case.model, prompt_batch(any_case.model, (2, 0, 1))
    expected = any_case.oracle.new_tokens(model, batch, **GREEDY)
    graphs, backend = counting_backend()
    config = CompileConfig(backend=backend, fullgraph=True, mode=None)
    config._compile_all_devices = True
    out = model.generate(**batch, **GREEDY, cache_implementation="static", compile_config=config)
    assert_says(out, batch, expected)
    assert len(graphs) == 1


@pytest.mark.parametrize(("order", "learned"), [("compile first", False), ("accelerate first", True)])
def test_prefill_of_a_compiled_language_model(order, learned) -> None:
    """One graph without a break for the whole language model, images in two of three rows."""
    eager, model = (tiny_llava(layers=2, text_layers=2) for _ in range(2))
    graphs, backend = counting_backend()
    if order == "compile first":
        model.model.language_model.compile(backend=backend, fullgraph=True)
    for one in (eager, model):
        accelerate_mllm(one, keep_ratio=0.5)
        if learned:
            randomise_cross_tokens(one)
    if order == "accelerate first":
        model.model.language_model.compile(backend=backend, fullgraph=True)
    batch = prompt_batch(model, (2, 0, 1))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, eager(**batch).logits)
    assert len(graphs) == 1


@pytest.mark.slow
def test_prefill_compiled_by_inductor() -> None:
    eager, model = (accelerate_mllm(tiny_llava(), keep_ratio=0.5) for _ in range(2))
    model.model.language_model.compile(fullgraph=True)
    batch = prompt_batch(model, (2, 0, 1))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, eager(**batch).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.generate(**batch, **GREEDY), eager.generate(**batch, **GREEDY))


def _step(lengths, step, tokens, cache, batch):
    """One decode step on compact inputs, as generate makes them: ids, 4D-able mask, positions of every row."""
    mask = torch.cat([batch["attention_mask"], batch["attention_mask"].new_ones(3, len(tokens))], dim=1)
    compact = lengths + len(tokens)
    longest = int(compact.max())
    columns = cache.layers[0].keys.shape[2]
    place = torch.arange(columns)
    visible = (place >= longest - compact[:, None]) & (place < longest)
    return step(
        input_ids=tokens[-1],
        attention_mask=visible[:, None, None],
        position_ids=(mask.sum(1) - 1)[:, None],
        past_key_values=cache,
        use_cache=True,
    )
