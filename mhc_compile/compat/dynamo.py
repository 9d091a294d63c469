"""Dynamo and what it hands to a backend: frames, sources, guards, checkpoints, backends, sizes, classes."""

from __future__ import annotations

import builtins
import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

# --- Dynamo: where the frame's values are, and guards (seen in 2.11, 2.13; read in 2.15) -----------------------------


def current_translator() -> Any | None:
    """Dynamo's translator of the frame being compiled; None outside of Dynamo."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx()
    except AttributeError:  # no translator is active on this thread
        return None


def current_scope() -> dict[str, Any]:
    """Locals and globals that the sources of the current frame are evaluated in; empty outside of Dynamo."""
    tx = current_translator()
    if tx is None:
        return {}
    return {"L": tx.output.local_scope, "G": tx.output.global_scope}


def is_resume_frame() -> bool:
    """True when the frame being compiled continues one that a graph break has cut."""
    tx = current_translator()
    return tx is not None and tx.f_code.co_name.startswith("torch_dynamo_resume_in_")


def break_reason(gm: fx.GraphModule) -> str:
    """Why Dynamo ended the graph before its frame did, with the user's line; empty if it did not."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not getattr(reason, "graph_break", False):
        return ""
    stack = list(getattr(reason, "user_stack", None) or [])
    place = f" at {stack[-1].filename}:{stack[-1].lineno}" if stack else ""
    return f"{reason.reason.splitlines()[0]}{place}"


def source_name(source: Any) -> str:
    """The expression that a Dynamo source stands for (a property in 2.11..2.15, a method before)."""
    name = source.name
    return str(name() if callable(name) else name)


def evaluate_source(name: str, scope: dict[str, Any]) -> Any:
    """Evaluate a source's expression in a frame's scope. Raises whatever the expression raises."""
    return eval(name, {**scope, "__builtins__": builtins.__dict__})  # Dynamo's own guard expressions


def graph_module(root: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule that writes its Python when it is first run or asked for it, if Dynamo's own graphs do.

    Most are never run as they are: AOTAutograd interprets their nodes.
    """
    from torch.fx._lazy_graph_module import _make_graph_module

    return _make_graph_module(root, graph)


def guard_instance(source: Any) -> None:
    """Tie the compiled artefact of the current frame to the very object that ``source`` evaluates to.

    Without it Dynamo runs the code compiled for one instance with another one of the same class. Guards are built
    after the backend has returned, so it may be called inside of it.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard

    install_guard(source.make_guard(GuardBuilder.ID_MATCH))


def never_compile_alone(function: Any) -> None:
    """Keep Dynamo from compiling a Python function as a frame of its own; within other frames it is traced as ever."""
    from torch._dynamo.eval_frame import skip_code

    skip_code(function.__code__)


def local_source(name: str) -> Any:
    """A source for a placeholder that Dynamo does not know (AOTAutograd asks each placeholder for one)."""
    from torch._dynamo.source import LocalSource

    return LocalSource(name)


def mark_static_parameter(node: fx.Node, parameter: torch.Tensor) -> None:
    """Tell AOTAutograd and CUDA graphs that a placeholder is a parameter: static shape, static address."""
    from torch._guards import TracingContext
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext

    source = local_source(f"__mhc_{node.name}")
    node._dynamo_source = source  # type: ignore[attr-defined]  # the attribute AOTAutograd reads
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    context = TracingContext.try_get()
    if context is not None:
        context.tensor_to_context[parameter] = StatefulSymbolicContext(
            dynamic_sizes=[DimDynamic.STATIC] * parameter.dim(),
            constraint_sizes=[None] * parameter.dim(),
            tensor_source=source,
        )


def tracing_fake_mode() -> Any | None:
    """The fake mode of the compilation in progress, None outside of one."""
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    return None if context is None else context.fake_mode


def under_ddp_optimizer() -> bool:
    """True when DDP has split the graph into buckets before the backend sees it."""
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    return context is not None and getattr(context, "ddp_optimizer_ctx", None) is not None


def passthrough_exceptions() -> tuple[type[BaseException], ...]:
    """Exceptions that are Dynamo's own control flow and must leave a backend as they are."""
    from torch._dynamo import exc

    return (exc.RestartAnalysis, exc.SkipFrame)


@contextlib.contextmanager
def keep_sizes() -> Iterator[None]:
    """Afterwards Dynamo remembers the sizes that it remembered before: a trace within leaves none behind.

    It keeps the sizes that it has seen of each code object (``pgo._CODE_STATE``) and makes those that differ the next
    time dynamic. Seen in 2.11, 2.13.
    """
    from torch._dynamo import pgo

    state = pgo.get_code_state()
    before = copy.deepcopy(dict(state))
    try:
        yield
    finally:
        if pgo._CODE_STATE is state:  # torch._dynamo.reset() has not thrown it away
            state.clear()
            state.update(before)


def capture_done() -> type[Exception]:
    """An exception class by which a capture-only backend leaves Dynamo without running anything."""
    from torch._dynamo.exc import ShortenTraceback

    class _CaptureDone(ShortenTraceback):
        def __init__(self) -> None:
            super().__init__("captured", first_useful_frame=None)

    return _CaptureDone


def is_exporting() -> bool:
    """True within ``torch.export``, also while Dynamo traces a caller of this.

    The public ``torch.compiler.is_exporting()`` folds to True under any Dynamo trace in 2.11 (2.13 reads this flag).
    """
    return bool(torch.compiler._is_exporting_flag)


@torch.compiler.assume_constant_result
def compiled_by_torch() -> bool:
    """True when a backend of torch's own (inductor, eager, cudagraphs, ...) compiles the frame in progress.

    Dynamo runs it while it traces a caller of this, and takes the answer for a constant (the backend is part of what
    it looks compiled code up by). Wrappers that may call any backend (DDP's splitter, the counters of
    ``torch._dynamo.testing``) and functions of the user are none of them.
    """
    tx = current_translator()
    backend = None if tx is None else tx.output.compiler_fn
    while backend is not None:
        inner = next((getattr(backend, name, None) for name in _BACKEND_INSIDE if hasattr(backend, name)), None)
        if inner is None:
            break
        backend = inner
    module = str(getattr(backend, "__module__", ""))
    if module == "torch":
        return type(backend).__name__ == "_TorchCompileInductorWrapper"
    return module.startswith("torch._dynamo.backends.") and not module.endswith(".distributed")


_BACKEND_INSIDE = ("_torchdynamo_orig_backend", "compiler_fn", "func")
"""Where torch's wrappers of a backend keep it: the debugging wrapper, ``torch.compile``'s, ``functools.partial``."""


def unsupported_exceptions() -> tuple[type[BaseException], ...]:
    """What Dynamo raises under ``fullgraph=True`` when it cannot capture a frame whole."""
    from torch._dynamo import exc

    return (exc.Unsupported, exc.UserError, exc.InternalTorchDynamoError)


def tracing_exceptions() -> tuple[type[BaseException], ...]:
    """What Dynamo raises when an operation of the user's model fails on fake tensors."""
    from torch._dynamo import exc

    return (exc.TorchRuntimeError,)


# --- activation checkpoints (seen in 2.11, 2.13) -------------------------------------------------------------------


def tag_activation_checkpoint() -> Any:
    """Dynamo's operator around the body of an activation checkpoint."""
    return torch.ops.higher_order.tag_activation_checkpoint


def next_checkpoint_id() -> int:
    """A fresh id for the nodes of one opened checkpoint: the partitioner keeps what passes from one to the next."""
    from torch._higher_order_ops.wrap import uid

    return int(next(uid))


# --- backends, traces, sizes and classes (seen in 2.11, 2.13; read in 2.15) -------------------------------------------


def lookup_backend(name: str) -> Any:
    """One of torch's own backends by name (``eager``, ``aot_eager``)."""
    from torch._dynamo.backends.registry import lookup_backend as lookup

    return lookup(name)


def trace_artifact(name: str, payload: str) -> None:
    """A structured-trace artifact, shown by tlparse (torch._logging.trace_structured)."""
    from torch._logging import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: payload)


def statically_equal(a: Any, b: Any) -> bool:
    """Equality of two sizes without adding a guard: symbols are equal when their expressions are."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def size_hint(size: Any, default: int = 1) -> int:
    """The number behind a size: itself, or what the symbol stood for while tracing (no guard); else ``default``."""
    if isinstance(size, int):
        return size
    hint = size.node.hint if size.node.has_hint() else None
    return int(hint) if isinstance(hint, int) else default


def is_dtensor(value: Any) -> bool:
    """True for a DTensor (public class; imported lazily because torch.distributed may be absent from a build)."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def is_data_parallel(module: Any) -> bool:
    """True for a module wrapped by DistributedDataParallel or sharded by FSDP (1 or 2)."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    return isinstance(module, (DistributedDataParallel, FullyShardedDataParallel, FSDPModule))
