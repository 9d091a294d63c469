"""Inductor and Triton: compiling with what is around a graph, graph passes, tracing for another compiler."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

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


def declare_fallbacks(ops: Iterable[torch._ops.OpOverload]) -> None:
    """Tell inductor ahead that these ops are called as they are, with the layout that their tags ask for.

    It finds that out by itself, but torch 2.11 spells out the call for a log message that nobody reads, with all the
    opaque calls that its arguments come from: time that doubles from call to call of a chain (mended in 2.13).
    """
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint
    from torch._library.utils import get_layout_constraint_tag

    for op in ops:
        if op not in lowerings:
            tag = get_layout_constraint_tag(op, with_default=True)
            make_fallback(op, layout_constraint=tag_to_layout_constraint(tag), warn=False)


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
