"""A converted model that is about to run without its hyper-connections says so."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mhc_compile
from mhc_compile.errors import UncompiledError
from mhc_compile.model import guard
from tests.tiny import EAGER, Block, Flat, compiled, ids, tiny


@pytest.fixture
def model() -> nn.Module:
    model = tiny(layers=1)
    compiled(model)(ids())
    return model


def test_called_uncompiled(model: nn.Module) -> None:
    with pytest.raises(UncompiledError, match="uncompiled"):
        model(ids())
    with mhc_compile.plain():
        model(ids())
    with pytest.raises(UncompiledError):
        model(ids())


def test_plain_nests_and_ends_with_an_error(model: nn.Module) -> None:
    with mhc_compile.plain():
        with mhc_compile.plain():
            pass
        model(ids())
        with pytest.raises(ZeroDivisionError), mhc_compile.plain():
            raise ZeroDivisionError
        model(ids())
    with pytest.raises(UncompiledError):
        model(ids())


def test_plain_is_of_one_thread(model: nn.Module) -> None:
    caught: list[BaseException] = []

    def call() -> None:
        try:
            model(ids())
        except UncompiledError as error:
            caught.append(error)

    with mhc_compile.plain():
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert len(caught) == 1


def test_compiled_within_plain_is_converted(model: nn.Module) -> None:
    call = compiled(model)
    with torch.no_grad():
        for parameter in model.layers[0].mhc0.parameters():
            parameter.add_(0.5)
        want = call(ids())
        with mhc_compile.plain():
            assert torch.equal(call(ids()), want)
            assert not torch.equal(model(ids()), want)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "adds in a block": (lambda: tiny(layers=1), ids),
    "adds in the root": (lambda: Flat(2), lambda: torch.randn(2, 3, 16)),
    "the root is a block": (Block, lambda: torch.randn(2, 3, 16)),
}


@pytest.mark.parametrize("route", ["compile", "prepare", "load_state_dict"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_route_guards(kind: str, route: str) -> None:
    make, data = MODELS[kind]
    model = make()
    x = data()
    if route == "load_state_dict":
        source = make()
        mhc_compile.prepare(source, x)
        mhc_compile.load_state_dict(model, mhc_compile.state_dict(source))
    elif route == "prepare":
        mhc_compile.prepare(model, x)
    else:
        compiled(model)(x)
    with pytest.raises(UncompiledError):
        model(x)
    assert torch.isfinite(compiled(model)(x)).all()
    with mhc_compile.plain():
        model(x)


def test_hooks_do_not_recompile(model: nn.Module) -> None:
    call = compiled(model)
    call(ids())
    with torch._dynamo.config.patch(error_on_recompile=True):
        call(ids(seed=2))


def test_install_once_and_remove() -> None:
    layer = nn.Linear(2, 2)
    handle = guard.install(layer)
    assert handle is not None
    assert guard.install(layer) is None
    layer.register_forward_pre_hook(lambda module, args: None)
    guard.remove(nn.Sequential(layer))
    assert len(layer._forward_pre_hooks) == 1
    layer(torch.zeros(2))


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_refused(model: nn.Module, strict: bool) -> None:
    """torch.export takes the model out of its wrapper and would export it without its hyper-connections."""
    for what in (model, compiled(model)):
        with pytest.raises(Exception, match="is being exported"):
            torch.export.export(what, (ids(),), strict=strict)


def test_tracing_is_refused(model: nn.Module) -> None:
    with pytest.raises(UncompiledError):
        torch.jit.trace(model, (ids(),))


def test_eager_stances_raise(model: nn.Module) -> None:
    call = compiled(model)
    call(ids())
    for stance in ("force_eager", "eager_on_recompile"):
        with torch.compiler.set_stance(stance), pytest.raises(UncompiledError):
            call(ids(3, 7))
    with pytest.raises(UncompiledError):
        torch.compiler.disable(model)(ids())


def test_suppress_errors_and_recompile_limit_raise(model: nn.Module) -> None:
    call = compiled(model)

    def fail(gm: object, inputs: object) -> object:
        raise RuntimeError("no")

    with torch._dynamo.config.patch(suppress_errors=True), pytest.raises(UncompiledError):
        torch.compile(model, backend=fail)(ids())
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1, automatic_dynamic_shapes=False):
        call(ids(2, 5))
        with pytest.raises(UncompiledError):
            call(ids(2, 6))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_another_backend_is_refused(model: nn.Module, backend: str) -> None:
    """It would compile the user's own forward: the plain model, fast and in silence."""
    other = torch.compile(model, backend=backend)
    with pytest.raises(UncompiledError):
        other(ids())
    torch._dynamo.reset()
    with pytest.raises(Exception, match="being compiled by another backend"):
        torch.compile(model, backend=backend, fullgraph=True)(ids())


def test_another_backend_within_plain(model: nn.Module) -> None:
    """What was compiled within plain() does not serve a call outside of it, and the other way round."""
    for fullgraph in (False, True):
        other = torch.compile(model, backend="eager", fullgraph=fullgraph)
        with mhc_compile.plain():
            other(ids())
        with pytest.raises(Exception, match="converted model"):
            other(ids())
        with mhc_compile.plain():
            other(ids())


def test_a_backend_of_the_user_may_call_ours(model: nn.Module) -> None:
    from mhc_compile.backend import mhc

    def counted(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        return mhc(gm, inputs, options=EAGER)

    want = compiled(model)(ids())
    assert torch.equal(torch.compile(model, backend=counted)(ids()), want)


def test_generate_style_methods(model: nn.Module) -> None:
    """A method of the wrapper runs the original module."""

    class Speaker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny(layers=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

        def generate(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = torch.cat([x, self(x)[:, -1:].argmax(-1)], dim=1)
            return x

    speaker = Speaker()
    call = compiled(speaker)
    call(ids())
    with pytest.raises(UncompiledError):
        call.generate(ids())
    with mhc_compile.plain():
        assert call.generate(ids()).shape == (2, 7)
    speaker.compile(backend="mhc", options=EAGER)
    assert speaker.generate(ids()).shape == (2, 7)
