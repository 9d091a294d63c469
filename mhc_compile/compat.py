"""Every private seam of torch that this package uses, in one place.

Each function says what it reads and in which versions that was seen; ``tests/test_compat.py`` fails loudly when one
moves. Nothing here changes torch but `remember_kernel_analysis`, which puts a memo around one of its functions, and
`keep_rounding_in_cpp`, which mends one of its settings.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
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


# --- inductor (seen in 2.11, 2.13; read in 2.15) ---------------------------------------------------------------------


def inductor_compile(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    config: dict[str, Any],
    around: Callable[[str, Callable[..., Any]], Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """``torch._inductor.compile``: AOTAutograd, partitioning, caches, CUDA graphs, code generation.

    ``around(source, run)`` is given inductor's code of each graph, forward and backward, compiled now or kept in its
    cache, and what runs it; it gives what runs instead. It is not asked where inductor captures CUDA graphs: what runs
    there replays them. AOTAutograd's cache knows nothing of it and is off with it. (The argument ``inner_compile`` of
    ``compile_fx``; ``source_code`` and ``current_callable`` of what it returns.)
    """
    from torch._inductor import compile as compile_graph

    if around is None:
        artefact: Callable[..., Any] = compile_graph(gm, list(inputs), options=config or None)
        return artefact
    import torch._functorch.config as autograd_config
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    @functools.wraps(compile_fx_inner)
    def inner(*args: Any, **kwargs: Any) -> Any:
        graph: Any = compile_fx_inner(*args, **kwargs)
        # A graph without a call is no code of inductor's.
        if hasattr(graph, "source_code") and not inductor_config.triton.cudagraphs:
            graph.current_callable = around(graph.source_code, graph.current_callable)
        return graph

    with autograd_config.patch(enable_autograd_cache=False):
        surrounded: Any = compile_fx(gm, list(inputs), inner, config_patches=config or None)
    return surrounded  # type: ignore[no-any-return]  # a callable: ahead of time nothing is compiled here


def keep_rounding_in_cpp() -> None:
    """Let inductor's C++ kernels round between fused operations where its setting ``emulate_precision_casts`` asks.

    They remember the value that a conversion to 16 bits was made from and give it back for the conversion to 32,
    setting or not (PyTorch's issue 185337; seen in 2.11, mended in 2.13). Without the setting nothing changes. A second
    call does nothing.
    """
    from torch._inductor import config
    from torch._inductor.codegen.cpp import CppKernel

    remember = CppKernel.cache_dtype_convert
    if hasattr(remember, "mhc_rounds"):
        return

    @functools.wraps(remember)
    def cache_dtype_convert(self: Any, *args: Any) -> None:
        if not config.emulate_precision_casts:
            remember(self, *args)

    cache_dtype_convert.mhc_rounds = True  # type: ignore[attr-defined]  # the mark that it is done
    CppKernel.cache_dtype_convert = cache_dtype_convert  # type: ignore[method-assign]  # this is the mending


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


# --- lowering: inductor's graph passes and Triton (seen in 2.11, 2.13) -----------------------------------------------


def inductor_decompositions() -> dict[Any, Any]:
    """The decomposition table that inductor traces with; what is traced after AOTAutograd must use it too."""
    from torch._inductor.decomposition import select_decomp_table

    return dict(select_decomp_table())


def chain_graph_passes(seam: str, ours: Any) -> Any:
    """`ours` behind the pass that the user has set for `seam` (a list of passes is accepted from 2.13 only)."""
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    theirs = getattr(config, seam)
    if theirs is None:
        return ours
    before = list(theirs) if isinstance(theirs, (list, tuple)) else [theirs]

    class Chained(CustomGraphPass):
        """The user's passes, then ours; without a key where one of theirs has none, so that nothing stale is cached."""

        def __call__(self, graph: fx.Graph) -> None:
            for step in (*before, ours):
                step(graph)

        def uuid(self) -> Any:
            keys = [step.uuid() if hasattr(step, "uuid") else None for step in (*before, ours)]
            return None if any(key is None for key in keys) else tuple(keys)

    return Chained()


def runs_joint_passes() -> bool:
    """True where inductor runs the passes of its joint seams (a setting of its own; seen in 2.11, 2.13)."""
    from torch._inductor import config

    return bool(config.use_joint_graph_passes)


def triton_version() -> str:
    """Triton's version, empty where it is not installed. Read from the metadata: importing it takes a while."""
    import importlib.metadata

    for distribution in ("triton", "pytorch-triton"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


# --- tracing a graph for another compiler (seen in 2.11, 2.13) -------------------------------------------------------


def fake_inputs(
    static: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], dynamic: Mapping[int, Sequence[int]]
) -> tuple[Any, list[torch.Tensor]]:
    """(fake mode, a fake of each tensor): sizes are numbers but for the ``dynamic`` axes of ``inputs``, by position."""
    from torch._dynamo.source import ConstantSource
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes: list[torch.Tensor] = [mode.from_tensor(tensor, static_shapes=True) for tensor in static]
    for position, tensor in enumerate(inputs):
        axes = {axis % tensor.dim() for axis in dynamic.get(position, ())}
        sizes = [DimDynamic.DYNAMIC if axis in axes else DimDynamic.STATIC for axis in range(tensor.dim())]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        fakes.append(
            mode.from_tensor(tensor, symbolic_context=context, source=ConstantSource(f"input_{position}"))
            if axes
            else mode.from_tensor(tensor, static_shapes=True)
        )
    return mode, fakes


def is_fixed(size: Any) -> bool:
    """True for a size that is a number, or a symbol that the trace has found to be one."""
    return not isinstance(size, torch.SymInt) or bool(size.node.expr.is_number)


def python_dispatcher() -> Any:
    """A context in which composite operators run their Python form: some C++ ones turn a symbol into a number."""
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher()


@contextlib.contextmanager
def outside_of_tracing() -> Iterator[None]:
    """Real tensors and real launches in the midst of a trace: no fake tensors, nothing is recorded, no gradient
    (torch.utils._python_dispatch._disable_current_modes, seen in 2.13)."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch.no_grad():
        yield


def keep_kernel_launches() -> None:
    """Tell fx that a traced kernel launch has an effect (it writes its outputs), or dead-code elimination drops it."""
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation

    fx.node.has_side_effect(triton_kernel_wrapper_mutation)


_ANALYSES = ("identify_accessed_tensors", "identify_mutated_tensors")
"""What reads off a Triton kernel which tensors it writes: the name in 2.13, in 2.11."""


def remember_kernel_analysis(package: str) -> None:
    """Let torch read each kernel of `package` once, not twice a launch.

    Inductor asks which tensors a launch writes by having Triton compile the kernel to its first IR, 0.02 to 0.3 s each
    time: with 650 launches (36 layers) more than all the rest of the compilation. The answer depends on the kernel, its
    constants and the dtypes of its tensors, and is kept under these. Other packages' kernels are not touched. A second
    call does nothing.
    """
    from torch._higher_order_ops import triton_kernel_wrap

    for name in _ANALYSES:
        analysis = getattr(triton_kernel_wrap, name, None)
        if analysis is not None and not hasattr(analysis, "mhc_package"):
            remembered = _remembered(analysis, package)
            remembered.mhc_package = package  # type: ignore[attr-defined]  # the mark that it is done
            setattr(triton_kernel_wrap, name, remembered)


def _remembered(analysis: Callable[..., Any], package: str) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    @functools.wraps(analysis)
    def remembered(kernel: Any, kwargs: dict[str, Any], tma_descriptor_metadata: Any) -> Any:
        function = getattr(kernel, "fn", None)
        ours = getattr(function, "__module__", "").split(".")[0] == package
        key = _analysis_key(kwargs) if ours and not tma_descriptor_metadata else None
        if key is None:
            return analysis(kernel, kwargs, tma_descriptor_metadata)
        if (function, key) not in known:
            known[function, key] = analysis(kernel, dict(kwargs), tma_descriptor_metadata)
        found = known[function, key]
        return list(found) if isinstance(found, list) else found

    return remembered


def _analysis_key(kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """What the answer depends on, as `generate_ttir` sees the arguments of a launch; None for what is not known."""
    import sympy
    from torch._inductor.ir import TensorBox
    from torch._subclasses.fake_tensor import FakeTensor

    key: list[Any] = []
    for name, value in kwargs.items():
        if isinstance(value, (FakeTensor, TensorBox)):
            key.append((name, value.dtype))
        elif isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, sympy.Expr)):
            key.append((name, "symbol"))
        elif value is None or isinstance(value, (bool, int, float, str)):
            key.append((name, type(value), value))
        else:
            return None
    return tuple(key)


def aot_inference(
    gm: fx.GraphModule, inputs: Sequence[Any], compiler: Callable[..., Any], decompositions: dict[Any, Any]
) -> Callable[..., Any]:
    """AOTAutograd around a compiler of inference graphs, ``compiler(aten graph, inputs)`` -> callable."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def boxed(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        return make_boxed_func(compiler(graph, example_inputs))

    artefact: Callable[..., Any] = aot_autograd(
        fw_compiler=boxed, inference_compiler=boxed, decompositions=decompositions
    )(gm, list(inputs))
    return artefact
