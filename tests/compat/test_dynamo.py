"""The private seams of Dynamo that are used are still where they were; loud when one moves."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from mhc_compile import compat
from tests.tiny import compiled, ids, tiny


def seen_inside(look: Any, model: nn.Module | None = None) -> Any:
    """What ``look(gm, inputs)`` finds while Dynamo compiles a call."""
    found: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        found.append(look(gm, inputs))
        return gm.forward

    torch.compile(model or tiny(layers=1), backend=backend)(ids())
    return found[0]


def test_outside_of_dynamo() -> None:
    assert compat.current_translator() is None
    assert compat.current_scope() == {}
    assert compat.is_resume_frame() is False
    assert compat.tracing_fake_mode() is None
    assert compat.under_ddp_optimizer() is False
    assert compat.is_exporting() is False


def test_scope_and_sources() -> None:
    model = tiny(layers=1)

    def look(gm: Any, inputs: Any) -> Any:
        scope = compat.current_scope()
        values = []
        for node in gm.graph.find_nodes(op="placeholder"):
            name = compat.source_name(node._dynamo_source)
            values.append(compat.evaluate_source(name, scope))
        assert compat.tracing_fake_mode() is not None
        assert not compat.is_resume_frame()
        assert not compat.under_ddp_optimizer()
        return values

    values = seen_inside(look, model)
    assert {id(v) for v in values} >= {id(p) for p in model.parameters()}


def test_break_reason_and_resume() -> None:
    found = []

    def backend(gm: Any, inputs: Any) -> Any:
        found.append((compat.break_reason(gm), compat.is_resume_frame()))
        return gm.forward

    def cut(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        return y.cos()

    torch.compile(cut, backend=backend)(torch.ones(2))
    assert "test_dynamo.py:" in found[0][0]
    assert [resumed for _, resumed in found] == [False, True]


def test_whose_backend_compiles() -> None:
    """Torch's own backends are told from ours, from the user's and from wrappers that may call any."""
    import functools

    from torch._dynamo.testing import CompileCounterWithBackend

    found: list[bool] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if compat.compiled_by_torch() else x - 1

    def mine(gm: Any, inputs: Any, note: str = "") -> Any:
        return gm.forward

    for backend in ("eager", "aot_eager", mine, functools.partial(mine, note=""), CompileCounterWithBackend("eager")):
        torch._dynamo.reset()
        found.append(bool(torch.compile(look, backend=backend)(torch.zeros(1)) == 1))
    torch._dynamo.reset()
    found.append(bool(compiled(look)(torch.zeros(1)) == 1))
    assert found == [True, True, False, False, False, False]
    assert compat.compiled_by_torch() is False


def test_graph_modules_are_written_when_they_are_run() -> None:
    """Within a compilation, as Dynamo's own; at once outside of one."""
    from torch.fx._lazy_graph_module import _LazyGraphModule

    def look(gm: Any, inputs: Any) -> Any:
        copy = compat.graph_module(gm, gm.graph)
        return isinstance(copy, _LazyGraphModule), torch.equal(copy(*inputs)[0], gm(*inputs)[0]), copy.code == gm.code

    assert seen_inside(look) == (isinstance(seen_inside(lambda gm, inputs: gm), _LazyGraphModule), True, True)
    plain = torch.fx.symbolic_trace(torch.nn.ReLU())
    assert not isinstance(compat.graph_module(plain, plain.graph), _LazyGraphModule)


def test_sizes_are_kept_and_dropped() -> None:
    """What was seen within is forgotten, what was seen before is not."""

    def f(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    dynamic: list[bool] = []

    def backend(gm: Any, inputs: Any) -> Any:
        dynamic.append(any(isinstance(value, (int, torch.SymInt)) for value in inputs))
        return gm.forward

    def fresh() -> Any:
        """The same code object without what is compiled for it."""
        torch._dynamo.eval_frame.remove_from_cache(f)
        return torch.compile(f, backend=backend)

    with compat.keep_sizes():
        fresh()(torch.zeros(3))
    fresh()(torch.zeros(4))
    with compat.keep_sizes():
        fresh()(torch.zeros(4))
        torch._dynamo.reset()  # throws the memory away: there is nothing to restore then
    fresh()(torch.zeros(5))
    with compat.keep_sizes():
        fresh()(torch.zeros(5))
    fresh()(torch.zeros(6))
    assert dynamic == [False, False, False, False, False, True]


def test_instance_guard() -> None:
    """With it each instance is compiled for itself; without it code is shared (the hazard is still there)."""
    counts = {}
    for guarded in (True, False):
        torch._dynamo.reset()
        calls: list[int] = []

        def backend(gm: Any, inputs: Any, guarded: bool = guarded, calls: list[int] = calls) -> Any:
            calls.append(1)
            if guarded:
                sources = [n._dynamo_source for n in gm.graph.find_nodes(op="placeholder")]
                while getattr(sources[0], "base", None) is not None:
                    sources[0] = sources[0].base
                compat.guard_instance(sources[0])
            return gm.forward

        for _ in range(2):
            torch.compile(nn.Linear(2, 2), backend=backend)(torch.ones(2))
        counts[guarded] = len(calls)
    assert counts == {True: 2, False: 1}


def test_static_parameter_mark() -> None:
    def look(gm: Any, inputs: Any) -> Any:
        node = gm.graph.find_nodes(op="placeholder")[0]
        extra = gm.graph.placeholder("extra")
        parameter = nn.Parameter(torch.ones(2))
        compat.mark_static_parameter(extra, parameter)
        assert type(extra._dynamo_source).__name__ == "LocalSource"
        assert extra.meta["tensor_dict"]["_dynamo_static_input_type"] == "unguarded"
        from torch._guards import TracingContext

        assert parameter in TracingContext.get().tensor_to_context
        gm.graph.erase_node(extra)
        return node is not None

    assert seen_inside(look)


def test_static_types_are_what_aot_reads() -> None:

    from torch._functorch._aot_autograd import frontend_utils

    assert "_dynamo_static_input_type" in inspect.getsource(frontend_utils)


def test_exceptions_of_dynamo() -> None:
    from torch._dynamo import exc

    assert issubclass(exc.TensorifyScalarRestartAnalysis, compat.passthrough_exceptions())
    assert issubclass(exc.SkipFrame, compat.passthrough_exceptions())
    assert issubclass(exc.Unsupported, compat.unsupported_exceptions())
    done = compat.capture_done()

    def backend(gm: Any, inputs: Any) -> Any:
        raise done

    with pytest.raises(done):
        torch.compile(lambda x: x + 1, backend=backend, fullgraph=True)(torch.ones(2))


def test_hook_is_skipped_alone_and_traced_within() -> None:
    seen = []

    def inner(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.compiler.is_compiling())
        return x + 1

    compat.never_compile_alone(inner)
    torch.compile(inner, backend="eager")(torch.ones(2))
    assert seen == [False]

    def traced(x: torch.Tensor) -> torch.Tensor:
        return x + (2 if torch.compiler.is_compiling() else 1)

    compat.never_compile_alone(traced)
    assert torch.compile(lambda x: traced(x), backend="eager")(torch.ones(1)).item() == 3


def test_checkpoint_operator() -> None:
    def look(gm: Any, inputs: Any) -> Any:
        return any(n.target is compat.tag_activation_checkpoint() for n in gm.graph.nodes)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny(layers=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    assert seen_inside(look, Checkpointed())
    assert compat.next_checkpoint_id() != compat.next_checkpoint_id()


def test_sizes() -> None:
    assert compat.statically_equal(3, 3)
    assert not compat.statically_equal(3, 4)

    def look(gm: Any, inputs: Any) -> Any:
        sizes = [v for v in inputs if isinstance(v, torch.SymInt)]
        return [compat.statically_equal(s, s + 0) and not compat.statically_equal(s, s + 1) for s in sizes]

    def backend(gm: Any, inputs: Any) -> Any:
        found.extend(look(gm, inputs))
        return gm.forward

    found: list[bool] = []
    torch.compile(lambda x: x * x.shape[0], backend=backend, dynamic=True)(torch.ones(3))
    assert found
    assert all(found)


def test_trace_artifact_needs_no_listener() -> None:
    compat.trace_artifact("name", "payload")


def test_classes_of_distributed() -> None:
    assert not compat.is_dtensor(torch.ones(1))
    assert not compat.is_data_parallel(nn.Linear(1, 1))


def test_hooks_added_while_compiling_do_not_recompile() -> None:
    assert torch._dynamo.config.skip_nnmodule_hook_guards
    model = tiny(layers=1)
    call = compiled(model)
    call(ids())
    with torch._dynamo.config.patch(error_on_recompile=True):
        call(ids())


def test_the_entry_point_is_found() -> None:
    assert "mhc" in torch._dynamo.list_backends()
