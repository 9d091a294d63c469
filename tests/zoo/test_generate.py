"""Text generation by converted models, as users spell it: ``model.compile(backend="mhc", dynamic=True)``, ``generate``.

``generate`` calls the model itself, not the wrapper that ``torch.compile(model)`` returns, so the model is compiled in
place. ``dynamic=True`` makes one graph of all prompt lengths and one of all later steps.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from mhc_compile.errors import UncompiledError
from mhc_compile.model import hyper_connections
from tests.tiny import EAGER
from tests.zoo import get
from tests.zoo.base import tokens

CACHES: dict[str, dict[str, Any]] = {"dynamic": {}, "static": {"cache_implementation": "static"}}
NEW = 8
SLOW = pytest.mark.slow  # one for every run of the tests, the others with `make zoo`
CASES = ["llama", *(pytest.param(n, marks=SLOW) for n in ("mixtral", "qwen3", "gpt2", "gemma3", "qwen3-moe"))]


def causal_lm(name: str) -> Any:
    """A fresh copy, the same bits for the same name, in eval mode; no token ends the text."""
    model = get(name).build(0).model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def generate(model: Any, length: int = 5, **settings: Any) -> Tensor:
    """Greedy text: int64 [2, length + NEW]."""
    prompt = tokens(0, length=length)
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False, **settings
    )


def graphs_of(model: Any, backend: str, **settings: Any) -> int:
    """Graphs compiled for one text and then others: the same length again, and a longer prompt."""
    torch._dynamo.reset()
    counters.clear()
    model.compile(backend=backend, options=EAGER if backend == "mhc" else None, dynamic=True)
    generate(model, **settings)
    first: int = counters["stats"]["unique_graphs"]
    generate(model, **settings)
    generate(model, length=6, **settings)
    assert counters["stats"]["unique_graphs"] == first, "another text compiles again"
    return first


def disturb(model: nn.Module) -> None:
    """Hyper-connections that have been trained: away from the start at which they change nothing."""
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, module in hyper_connections(model):
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.5)


@pytest.mark.zoo
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", CASES)
def test_generates(name: str, cache: str) -> None:
    settings = CACHES[cache]
    plain = causal_lm(name)
    want = generate(plain, **settings)
    model: Any = causal_lm(name)
    # Prefill and decode; for a sliding window that fills up, what the model's own Python branches ask for.
    expected = 2 if name != "gemma3" else graphs_of(causal_lm(name), "eager", **settings)
    assert graphs_of(model, "mhc", **settings) == expected
    assert sum(1 for _ in hyper_connections(model)) == get(name).sites(model)
    assert torch.equal(generate(model, **settings), want)

    disturb(model)
    trained = generate(model, **settings)
    assert not torch.equal(trained, want)
    assert torch.equal(trained, generate(model, use_cache=False)), "the cached steps see other streams"


@pytest.mark.zoo
def test_generate_of_the_wrapper_is_refused_with_the_cure() -> None:
    """``torch.compile(model).generate`` is the original model's method: it would run uncompiled."""
    model: Any = causal_lm("llama")
    wrapper: Any = torch.compile(model, backend="mhc", options=EAGER)
    wrapper(input_ids=tokens(0))
    with pytest.raises(UncompiledError, match=r"model\.compile\(backend='mhc'\) also covers generate\(\)"):
        generate(wrapper)
    model.compile(backend="mhc", options=EAGER, dynamic=True)
    assert torch.equal(generate(model), generate(causal_lm("llama")))


@pytest.mark.zoo
@pytest.mark.parametrize("backend", ["eager", pytest.param("mhc", marks=SLOW)])
def test_compilation_by_generate_itself(backend: str) -> None:
    """With a static cache on a GPU ``generate`` compiles the steps on its own, by inductor unless told otherwise."""
    from transformers import CompileConfig

    model: Any = causal_lm("llama")
    model.compile(backend="mhc", options=EAGER, dynamic=True)
    generate(model)
    disturb(model)
    want = generate(model)
    config = CompileConfig(backend=backend, mode=None if backend == "mhc" else "default")
    config.options = EAGER if backend == "mhc" else None
    config._compile_all_devices = True  # what a GPU does
    assert torch.equal(generate(model, cache_implementation="static", compile_config=config), want)


@pytest.mark.zoo
@SLOW
def test_beams_and_sampling() -> None:
    plain, model = causal_lm("llama"), causal_lm("llama")
    model.compile(backend="mhc", options=EAGER, dynamic=True)
    assert torch.equal(generate(model, num_beams=3), generate(plain, num_beams=3))
    drawn = []
    for one in (plain, model):
        torch.manual_seed(3)
        prompt = tokens(0, length=5)
        drawn.append(one.generate(prompt, max_new_tokens=NEW, do_sample=True, top_k=5))
    assert torch.equal(*drawn)


@pytest.mark.zoo
@SLOW
def test_encoder_decoder() -> None:
    """``generate`` calls the encoder on its own: it is compiled in place as well."""
    plain, model = causal_lm("mbart"), causal_lm("mbart")
    model.compile(backend="mhc", options=EAGER, dynamic=True)
    model(**get("mbart").build(0).inputs)
    ids = tokens(0)
    with pytest.raises(UncompiledError):
        model.generate(ids, max_new_tokens=NEW, do_sample=False)
    model.get_encoder().compile(backend="mhc", options=EAGER, dynamic=True)
    want = plain.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False), want)
    assert sum(1 for _ in hyper_connections(model)) == get("mbart").sites(model)
