"""MLIR: a converted graph for other compilers and other hardware, and as text for tests.

``to_mlir`` traces the graph (a model is converted first) to ATen, replaces each semantic op by its traced native body
(one trace for each shape and set of attributes, so that eight Sinkhorn loops cost one), and lets torch-mlir import and
lower it. ``run_mlir`` compiles the result and runs it on the CPU, see ``mlir_engines``. torch-mlir is imported when it
is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from mhc_compile import compat
from mhc_compile.errors import LayoutError, MhcError, MissingDependencyError, OptionError
from mhc_compile.ops import OPS

from . import mlir_engines
from .base import BACKWARD_TARGETS, FORWARD_TARGETS, LoweringLog, arguments
from .inline import inline, replace, signature
from .mlir_engines import Slot

OUTPUT_TYPES = ("linalg-on-tensors", "torch", "stablehlo", "tosa")
WEIGHTS = ("inline", "external")
PIP = "pip install 'mhc-compile[mlir]'"


@dataclasses.dataclass(frozen=True)
class MlirModule:
    """A lowered graph: ``str()`` is its text, ``module`` torch-mlir's own object, its one function is ``main``."""

    module: Any
    output_type: str
    weights: Mapping[str, Tensor]
    """Leading arguments of ``main``, in order; empty where the weights are constants of the text."""
    arguments: Sequence[Slot]
    """Of ``main``: the weights that are external, then the inputs."""
    results: Sequence[Slot | None]
    """Of ``main``; None for an integer."""

    def __str__(self) -> str:
        return self.text()

    def text(self, large_elements: int | None = None) -> str:
        """The text; constants of more than ``large_elements`` elements are left out (it no longer compiles then)."""
        text: str = self.module.operation.get_asm(large_elements_limit=large_elements, enable_debug_info=False)
        return text

    def save(self, path: str | Path) -> None:
        """Write the whole text, after a comment for each weight that is an argument."""
        names = "".join(f"// %arg{index}: {name}\n" for index, name in enumerate(self.weights))
        Path(path).write_text(names + self.text(), encoding="utf-8")


Axes = Mapping[Any, int | Sequence[int]]
"""Position of an input (of a model's inputs, or keyword) -> axis or axes that may vary."""

_converters: list[Callable[..., fx.GraphModule]] = []


def use_converter(convert: Callable[..., fx.GraphModule]) -> None:
    """Say what makes a graph of a model: ``standalone`` does, which stands above this room and names itself here."""
    _converters[:] = [convert]


def _graph_of(
    model: nn.Module, inputs: Sequence[Any], dynamic: Axes | None, options: Mapping[str, Any]
) -> tuple[fx.GraphModule, Axes | None]:
    """(graph, dynamic axes of its inputs): a model is converted first, a graph is taken as it is."""
    if isinstance(model, fx.GraphModule):
        if options:
            raise OptionError(
                f"{', '.join(sorted(options))}: options say how a model is converted, and this is a graph already",
                cure="give them to mhc_compile.standalone",
            )
        return model, dynamic
    if not isinstance(model, nn.Module):
        raise OptionError(f"MLIR is made of a model or of a graph of standalone, not of a {type(model).__name__}")
    return _converters[0](model, *inputs, dynamic=dynamic, **options), None


def to_mlir(
    model: nn.Module,
    *inputs: Any,
    output_type: str = "linalg-on-tensors",
    dynamic: Axes | None = None,
    weights: str = "inline",
    **options: Any,
) -> MlirModule:
    """Lower a model, converted, to MLIR, for inference.

    Args:
        model: a model, in the mode (eval) that the MLIR shall have; or a graph of ``mhc_compile.standalone``, which
            is taken as it is.
        inputs: as ``standalone`` takes them; of the tensors among them, shapes and dtypes are read.
        output_type: ``linalg-on-tensors``, ``torch`` (the dialect that IREE takes), ``stablehlo`` or ``tosa``.
        dynamic: position of an input -> axis or axes that may vary; None means, for a graph, those that ``standalone``
            was told of.
        weights: ``inline`` (constants of the module) or ``external`` (the first arguments of ``main``).
        options: for a model, as ``torch.compile(..., options=...)``.

    Raises:
        MissingDependencyError: torch-mlir is not installed, or lacks what is used of it.
        OptionError: an illegal argument, or a dynamic axis that the graph fixes.
        MhcError: torch-mlir cannot lower an operation; the message names it.
    """
    if output_type not in OUTPUT_TYPES:
        raise OptionError(f"output_type={output_type!r} is not legal", cure=f"one of {', '.join(OUTPUT_TYPES)}")
    if weights not in WEIGHTS:
        raise OptionError(f"weights={weights!r} is not legal", cure=f"one of {', '.join(WEIGHTS)}")
    torch_mlir()
    graph, axes = _graph_of(model, inputs, dynamic, options)
    inputs = flat_tensors(inputs)
    with _without_collection():
        traced, held = trace(graph, inputs, _axes(graph, axes))
        if weights == "inline":
            bind_weights(traced, held)
        module = import_graph(traced, output_type)
    return MlirModule(module, output_type, held if weights == "external" else {}, *slots(traced))


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """No garbage collection in between: tracing makes many small objects that all live until the end, and looking
    through them again and again is a tenth of the time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def run_mlir(
    model: nn.Module, *inputs: Any, engine: str = "auto", dynamic: Axes | None = None, **options: Any
) -> tuple[Tensor, ...]:
    """Lower, compile and run a model or a graph of ``standalone`` on the CPU, once; see ``compile_mlir``."""
    return compile_mlir(model, *inputs, engine=engine, dynamic=dynamic, **options)(*flat_tensors(inputs))


def compile_mlir(
    model: nn.Module, *inputs: Any, engine: str = "auto", dynamic: Axes | None = None, **options: Any
) -> mlir_engines.Compiled:
    """Lower and compile a model or a graph of ``standalone`` for the CPU.

    Args:
        model: as ``to_mlir``; its weights are read where they are, not copied into the artefact. A model's new
            hyper-connections start anew at each call: convert it once (``standalone``) to keep them.
        inputs, dynamic, options: as ``to_mlir``.
        engine: ``iree`` (real code; needs iree-base-compiler and iree-base-runtime), ``wheel`` (LLVM's JIT from the
            torch-mlir wheel, scalar loops: for tests and small shapes), or ``auto``: IREE where it is installed.

    Returns:
        A callable from inputs to a tuple of tensors.

    Raises:
        MissingDependencyError, OptionError, MhcError: as ``to_mlir``.
    """
    name = mlir_engines.choose(engine)
    output_type = mlir_engines.OUTPUT_TYPE[name]
    graph, axes = _graph_of(model, inputs, dynamic, options)
    lowered = to_mlir(graph, *inputs, output_type=output_type, dynamic=axes, weights="external")
    values = list(lowered.weights.values())
    return mlir_engines.compile_module(name, lowered.module, values, lowered.arguments, lowered.results)


def compile_inference(gm: fx.GraphModule, inputs: Sequence[Any], log: LoweringLog) -> Callable[..., Any]:
    """The backend's way (``lowering="mlir"``): a Dynamo graph through AOTAutograd and IREE, for the CPU.

    Args:
        gm: the rewritten graph, parameters as placeholders.
        inputs: example inputs of ``gm``.
        log: gets an entry for each semantic op.

    Raises:
        OptionError: gradients are wanted, or a tensor is not on the CPU.
        MissingDependencyError, MhcError: as ``compile_mlir``.
    """
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if torch.is_grad_enabled() and any(value.requires_grad for value in tensors):
        raise OptionError(
            "lowering='mlir' is for inference: it has no backward graph, and this call wants gradients",
            cure="call the model under torch.no_grad() or torch.inference_mode(), or train with lowering='auto'",
        )
    elsewhere = next((value.device for value in tensors if value.device.type != "cpu"), None)
    if elsewhere is not None:
        raise OptionError(
            f"lowering='mlir' runs on the CPU, and the model has tensors on {elsewhere}",
            cure="to_mlir gives text for other targets; lowering='auto' compiles for this device",
        )
    mlir_engines.choose("iree")
    torch_mlir()

    def compiler(graph: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        expand_semantic_ops(graph, log)
        kept = replace_symbol_inputs(graph)
        takes, gives = slots(graph)
        module = import_graph(graph, mlir_engines.OUTPUT_TYPE["iree"])
        compiled = mlir_engines.compile_module("iree", module, (), takes, gives)
        return lambda *values: compiled(*[values[position] for position in kept])

    return compat.aot_inference(gm, inputs, compiler, decompositions())


# ------------------------------------------------------------------------------------------------ torch-mlir
@functools.cache
def torch_mlir() -> Any:
    """The module ``torch_mlir.fx``. Raises MissingDependencyError where it is missing or too old."""
    try:
        from torch_mlir import fx as front
    except ImportError as error:
        raise MissingDependencyError(f"MLIR needs torch-mlir: {error}", cure=PIP) from error
    if not hasattr(front, "stateless_fx_import") or not hasattr(front, "FxImporterHooks"):
        raise MissingDependencyError("the installed torch-mlir is too old: it has no stateless_fx_import", cure=PIP)
    return front


@functools.cache
def decompositions() -> dict[Any, Any]:
    """What is taken apart before torch-mlir sees it: its own list."""
    torch_mlir()
    from torch_mlir.extras.fx_decomp_util import get_decomposition_table

    return dict(get_decomposition_table())


# ------------------------------------------------------------------------------------------------ tracing
def flat_tensors(inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """The tensors among the inputs of a model, in the order in which ``standalone`` takes them."""
    return tuple(leaf for leaf in pytree.tree_leaves(list(inputs)) if isinstance(leaf, Tensor))


def _axes(graph: fx.GraphModule, dynamic: Axes | None) -> dict[int, tuple[int, ...]]:
    if dynamic is None:
        return dict(graph.meta.get("mhc_dynamic", {}))
    return {key: (axes,) if isinstance(axes, int) else tuple(axes) for key, axes in dynamic.items()}


def trace(
    graph: fx.GraphModule, inputs: Sequence[Tensor], dynamic: Mapping[int, Sequence[int]]
) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """(ATen graph without semantic ops and mutation, weights): it takes the weights, then the inputs.

    The graph is for reading: the code of the module is not made anew for it.
    """
    names = list(dict.fromkeys(str(node.target) for node in graph.graph.find_nodes(op="get_attr")))
    found: dict[str, Any] = {name: functools.reduce(getattr, name.split("."), graph) for name in names}
    held: dict[str, Tensor] = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    expected = len(graph.graph.find_nodes(op="placeholder"))
    if len(inputs) != expected:
        raise OptionError(f"the graph takes {expected} tensors and got {len(inputs)}")
    mode, fakes = compat.fake_inputs(list(held.values()), inputs, dynamic)

    def call(values: Sequence[Tensor], *arguments: Tensor) -> Any:
        return torch.func.functional_call(graph, dict(zip(held, values, strict=True)), arguments)

    def tracing(function: Any) -> fx.GraphModule:
        with torch.no_grad(), mode, compat.python_dispatcher():
            return make_fx(function, decomposition_table=decompositions(), tracing_mode="real")(
                fakes[: len(held)], *fakes[len(held) :]
            )

    traced = tracing(call)
    if any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable for node in traced.graph.nodes
    ):
        # Only then, and on operators: over composite ones functionalisation turns symbolic sizes into numbers.
        traced = tracing(torch.func.functionalize(_flat(traced), remove="mutations"))
    expand_semantic_ops(traced)
    traced.graph.eliminate_dead_code()
    for position, axes in dynamic.items():
        for axis in axes:
            if compat.is_fixed(fakes[len(held) + position].shape[axis]):
                raise OptionError(
                    f"axis {axis} of input {position} is asked to be dynamic, and the graph fixes it to "
                    f"{inputs[position].shape[axis]}",
                    cure="give `dynamic` to mhc_compile.standalone as well, which otherwise fixes every size",
                )
    return traced, held


def _flat(traced: fx.GraphModule) -> Any:
    def call(values: Sequence[Tensor], *arguments: Tensor) -> Any:
        return traced(values, *arguments)

    return call


def expand_semantic_ops(gm: fx.GraphModule, log: LoweringLog | None = None) -> int:
    """Replace each ``mhc::`` node by its native body, traced once for each signature; returns how many there were."""
    bodies: dict[Any, fx.GraphModule] = {}
    count = 0
    for node in list(gm.graph.nodes):
        name = FORWARD_TARGETS.get(node.target)
        if name is None:
            if node.target in BACKWARD_TARGETS:
                raise MhcError("MLIR is for inference, and the graph has a backward op of a hyper-connection")
            continue
        flat, spec = pytree.tree_flatten((node.args, node.kwargs))
        nodes = [value for value in flat if isinstance(value, fx.Node)]
        key = signature(OPS[name].native, spec, flat)
        if key not in bodies:
            bodies[key] = _trace_body(OPS[name].native, flat, spec, nodes)
        replace(node, inline(gm.graph, node, bodies[key], nodes))
        count += 1
        if log is not None:
            log.record(name, "mlir")
    return count


def _trace_body(function: Any, flat: list[Any], spec: Any, nodes: Sequence[fx.Node]) -> fx.GraphModule:
    def closed(*values: Any) -> Any:
        feed = iter(values)
        args, kwargs = pytree.tree_unflatten([next(feed) if isinstance(v, fx.Node) else v for v in flat], spec)
        return function(*args, **kwargs)

    with torch.no_grad(), compat.python_dispatcher():
        body = make_fx(closed, decomposition_table=decompositions(), tracing_mode="real")(
            *[node.meta["val"] for node in nodes]
        )
    body.graph.eliminate_dead_code()
    return body


def bind_weights(gm: fx.GraphModule, held: Mapping[str, Tensor]) -> None:
    """Turn the leading placeholders into attributes, which are imported as constants."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    for index, (node, value) in enumerate(zip(placeholders, held.values(), strict=False)):
        name = f"weight_{index}"
        gm.register_buffer(name, value.detach())
        with gm.graph.inserting_before(node):
            constant = gm.graph.get_attr(name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
        gm.graph.erase_node(node)


def replace_symbol_inputs(gm: fx.GraphModule) -> list[int]:
    """Read symbolic sizes off the tensors that have them; returns the positions of the arguments that are kept."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    kept = []
    for position, node in enumerate(placeholders):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            kept.append(position)
            continue
        if node.users:
            place = _size_like(placeholders, str(value))
            if place is None:
                raise LayoutError(f"the graph takes the number {node.name}, which is the size of no tensor it takes")
            with gm.graph.inserting_before(placeholders[-1].next):
                size = gm.graph.call_function(torch.ops.aten.sym_size.int, place)
            size.meta["val"] = value
            node.replace_all_uses_with(size)
        gm.graph.erase_node(node)
    return kept


def _size_like(placeholders: Sequence[fx.Node], symbol: str) -> tuple[fx.Node, int] | None:
    for node in placeholders:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            sizes: Sequence[Any] = value.shape
            for axis, size in enumerate(sizes):
                if isinstance(size, torch.SymInt) and str(size) == symbol:
                    return node, axis
    return None


def slots(gm: fx.GraphModule) -> tuple[list[Slot], list[Slot | None]]:
    """(arguments, results) of a traced graph; a result that is None is an integer."""
    takes = [Slot.of(node.meta["val"]) for node in gm.graph.find_nodes(op="placeholder")]
    values = [node.meta.get("val") for node in pytree.tree_leaves(gm.graph.output_node().args[0])]
    return takes, [Slot.of(value) if isinstance(value, Tensor) else None for value in values]


# ------------------------------------------------------------------------------------------------ import
def import_graph(gm: fx.GraphModule, output_type: str) -> Any:
    """torch-mlir's module for an ATen graph. Raises MhcError with torch-mlir's reason."""
    front = torch_mlir()
    from torch_mlir import ir
    from torch_mlir.dialects import torch as torch_dialect

    context = ir.Context()
    torch_dialect.register_dialect(context)
    told: list[str] = []

    def listen(diagnostic: Any) -> bool:
        told.append(str(diagnostic))
        return True

    context.attach_diagnostic_handler(listen)
    _adapt(gm)
    try:
        return front.stateless_fx_import(
            gm, output_type=output_type, fx_importer=front.FxImporter(context=context, hooks=_hooks())
        )
    except Exception as error:  # torch-mlir raises its own and builtin classes; all mean that the graph is not taken
        reason = told[0] if told else f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise MhcError(
            f"torch-mlir cannot lower the graph to {output_type}: {reason}",
            cure="output_type='torch' (which IREE reads) and 'linalg-on-tensors' take the most operations",
        ) from error


def _adapt(gm: fx.GraphModule) -> None:
    """Two forms that torch-mlir refuses, in forms that it takes.

    A constant with two readers: the importer binds an attribute anew at each use. ``topk`` that leaves the order of its
    results open: descending order is one of those it may have.
    """
    for node in gm.graph.find_nodes(op="get_attr"):
        if len(node.users) > 1:
            with gm.graph.inserting_after(node):
                alias = gm.graph.call_function(torch.ops.aten.alias.default)
            node.replace_all_uses_with(alias)
            alias.args = (node,)
            alias.meta = dict(node.meta)
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.topk.default):
        given = arguments(node)
        node.args = (given["self"], given["k"], given["dim"], given["largest"], True)
        node.kwargs = {}


def _hooks() -> Any:
    """Constants as they lie in memory: torch-mlir's own way makes a Python list of every element."""
    from torch_mlir.extras import fx_importer
    from torch_mlir.ir import DenseResourceElementsAttr, Operation

    class Literals(fx_importer.FxImporterHooks):
        def resolve_literal(self, gni: Any, literal: Any, info: Any) -> Any:
            if not isinstance(literal, Tensor) or literal.numel() < 2 or literal.dtype not in _NUMPY:
                return None
            array = literal.detach().cpu().contiguous().numpy()
            tensor_type = fx_importer.create_mlir_tensor_type(literal)
            name = f"weight_{'_'.join(map(str, literal.shape))}"
            attribute = DenseResourceElementsAttr.get_from_buffer(array, name, tensor_type)
            return Operation.create(
                name="torch.vtensor.literal",
                results=[gni._cc.tensor_to_vtensor_type(literal)],
                attributes={"value": attribute},
            ).result

    return Literals()


_NUMPY = frozenset({torch.float32, torch.float64, torch.float16, torch.int64, torch.int32})
"""Types whose numpy and MLIR layouts are the same and need no detour."""
