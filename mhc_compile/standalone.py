"""``standalone``: the rewritten graph of a model as a module of its own, parameters and all.

What it is for: the eager oracle of the compiled model, and the way to everything that takes a plain graph
(``torch.export``, MLIR, another compiler). It shares its parameters with the model and knows nothing else of it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from mhc_compile import compat
from mhc_compile.api import split_inputs, trace
from mhc_compile.capture.graph import copy_graph, meta_value
from mhc_compile.convert import Conversion
from mhc_compile.errors import FragmentError, OptionError
from mhc_compile.lowering.mlir import use_converter
from mhc_compile.model.state import unwrap

Axes = Mapping[int | str, int | Sequence[int]]
"""Which sizes of which input may vary: position among the inputs, or keyword, -> axis or axes."""


class StandaloneGraph(fx.GraphModule):
    """A GraphModule that is pickled as its list of nodes.

    ``fx.GraphModule`` pickles its source text and traces it again on loading; what takes no tensor (a grad mode
    switch, an autocast region, ``torch.rand(3)``) would be executed there, once, instead of becoming a node.
    """

    @property
    def dynamic(self) -> dict[int, tuple[int, ...]]:
        """Position of an input -> its axes that may vary."""
        found: dict[int, tuple[int, ...]] = self.meta.get("mhc_dynamic", {})
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph; the caller's grad mode is back afterwards, also when it fails inside a ``no_grad`` region."""
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            return super().__call__(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        values = {
            str(node.target): attribute_of(self, str(node.target)) for node in self.graph.find_nodes(op="get_attr")
        }
        return _restore, (_pack(self.graph), values, {"mhc_dynamic": self.dynamic})


def standalone(model: nn.Module, *inputs: Any, dynamic: Axes | None = None, **options: Any) -> StandaloneGraph:
    """Convert a model and return the rewritten graph as an ordinary module; the model itself stays as it is.

    Args:
        model: the module, or its compiled wrapper; in the mode (train or eval) that the graph shall have.
        inputs: positional arguments of its forward; a dictionary as the last one gives keyword arguments.
        dynamic: sizes that may vary, ``{0: 1}`` or ``{"input_ids": (0, 1)}``; all others are fixed. Inputs marked with
            ``torch._dynamo.mark_dynamic`` need no mention.
        options: as ``torch.compile(..., options=...)``; those about compiling have no effect here.

    Returns:
        A GraphModule. It takes the tensors among the inputs, in their order, and returns the tensors of the model's
        result as a tuple. Parameters and buffers are the model's own objects under the model's names; those of new
        hyper-connections have the names that ``prepare`` would give them (``model.layers.0.mhc0.phi``). It runs
        eagerly, differentiates, goes through ``torch.export``, and is saved by ``torch.save`` and loaded by
        ``torch.load(..., weights_only=False)`` where ``mhc_compile`` is installed.

    Raises:
        MhcError: as the compiled model would raise.
        OptionError: ``dynamic`` names an input or axis that is not there, or one that the model fixes.
    """
    model = unwrap(model)
    args, kwargs = split_inputs(model, inputs)
    if dynamic is not None:
        args, kwargs = _mark(args, kwargs, dynamic)
    with torch.enable_grad():  # so that regions without gradients are seen; the graph runs in either mode
        conversion = trace(model, [*args, kwargs] if kwargs else args, options, commit=False)
    tensors = _tensors(model, args, kwargs)
    graph = _assemble(conversion, tensors)
    for position, (name, tensor) in enumerate(tensors.items()):
        for axis in sorted(getattr(tensor, "_dynamo_dynamic_indices", ())):
            if axis not in graph.dynamic.get(position, ()):
                raise OptionError(
                    f"axis {axis} of {name} is to be dynamic, and the model fixes it to {tensor.shape[axis]}",
                    cure="leave that axis out; an example size of 0 or 1 is taken for fixed, too",
                )
    return graph


use_converter(standalone)  # MLIR of a model is that of its standalone graph


# ------------------------------------------------------------------------------------------------ inputs
def _mark(args: list[Any], kwargs: dict[str, Any], dynamic: Axes) -> tuple[list[Any], dict[str, Any]]:
    """Aliases of the inputs with the named axes marked: the marks stay off the user's tensors."""
    args, kwargs = list(args), dict(kwargs)
    for key, axes in dynamic.items():
        holder: Any = args if isinstance(key, int) else kwargs
        present = 0 <= key < len(args) if isinstance(key, int) else key in kwargs
        value = holder[key] if present else None
        if not isinstance(value, torch.Tensor):
            raise OptionError(
                f"dynamic names the input {key!r}, which is no tensor of this call",
                cure="use a position among the inputs, or a key of the dictionary given as the last input",
            )
        value = value.detach().requires_grad_(value.requires_grad)
        for axis in (axes,) if isinstance(axes, int) else axes:
            if not -value.dim() <= axis < value.dim():
                raise OptionError(f"dynamic names axis {axis} of input {key!r}, which has {value.dim()} axes")
            torch._dynamo.mark_dynamic(value, axis % value.dim())
        holder[key] = value
    return args, kwargs


def _tensors(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Name -> tensor for the leaves of the inputs, in their order, named as ``forward`` names them."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    stems = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    stems += [f"input_{position}" for position in range(len(stems), len(args))]
    found: dict[str, torch.Tensor] = {}
    for stem, value in [*zip(stems, args, strict=False), *kwargs.items()]:
        leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        for index, leaf in enumerate(leaves):
            found[stem if len(leaves) == 1 else f"{stem}_{index}"] = leaf
    return found


# ------------------------------------------------------------------------------------------------ the graph
def _assemble(conversion: Conversion, tensors: dict[str, torch.Tensor]) -> StandaloneGraph:
    """Placeholders become inputs in the caller's order, attributes, or sizes read off an input."""
    gm = copy_graph(conversion.gm)
    graph = gm.graph
    placeholders = graph.find_nodes(op="placeholder")
    names = _attribute_names(conversion, placeholders)
    values = {str(node.target): attribute_of(gm, str(node.target)) for node in graph.find_nodes(op="get_attr")}
    by_identity = {id(tensor): name for name, tensor in reversed(list(tensors.items()))}
    inputs: dict[str, fx.Node] = {}
    sizes: list[fx.Node] = []
    for node, value in zip(placeholders, conversion.inputs, strict=True):
        name = by_identity.get(id(value)) if node.name not in names else None
        if name is not None:
            inputs[name] = node
        elif isinstance(value, torch.Tensor):
            _to_attribute(node, names.get(node.name, f"constants.{node.name}"), value, values)
        else:
            sizes.append(node)
    start = next(iter(graph.nodes))
    ordered = []
    for name in tensors:
        with graph.inserting_before(start):
            new = graph.placeholder(name)
        if name in inputs:
            new.meta = dict(inputs[name].meta)
            inputs[name].replace_all_uses_with(new)
            graph.erase_node(inputs[name])
            start = new.next if start is inputs[name] else start
        ordered.append(new)
    for node in sizes:
        _replace_size(node, ordered)
    _keep_grad_mode(graph)
    result = StandaloneGraph(values, graph)
    result.meta["mhc_dynamic"] = dynamic_axes(ordered)
    graph.lint()
    return result


def attribute_of(holder: nn.Module, name: str) -> Any:
    """The value of a dotted name; a nested graph (the body of a higher-order operator) in a form that can be saved."""
    value = functools.reduce(getattr, name.split("."), holder)
    if isinstance(value, fx.GraphModule) and not isinstance(value, StandaloneGraph):
        inner = {
            str(node.target): attribute_of(value, str(node.target)) for node in value.graph.find_nodes(op="get_attr")
        }
        return StandaloneGraph(inner, copy_graph(value).graph)
    return value


def _attribute_names(conversion: Conversion, placeholders: Sequence[fx.Node]) -> dict[str, str]:
    """Placeholder name -> qualified name of the parameter or buffer behind it."""
    refs = conversion.modules.refs
    names = {name: ".".join((*ref.path, ref.name)) for name, ref in refs.items()}
    slots = conversion.parameters.slots
    for node, (module, key) in zip(placeholders[len(placeholders) - len(slots) :], slots, strict=True):
        names[node.name] = f"{conversion.parameters.used[id(module)][0]}.{key}"
    return names


def _to_attribute(node: fx.Node, name: str, value: torch.Tensor, values: dict[str, Any]) -> None:
    if values.get(name, value) is not value:  # two modules outside of each other may hold the same names
        name = f"constants.{node.name}"
    values[name] = value
    with node.graph.inserting_before(node):
        new = node.graph.create_node("get_attr", name)
    new.meta = {key: item for key, item in node.meta.items() if key != "tensor_dict"}
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _keep_grad_mode(graph: fx.Graph) -> None:
    """What leaves a ``no_grad`` region goes back to the caller's mode, not to the one the graph was traced in."""
    switches = [n for n in graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled) if n.args[0]]
    if switches:
        with graph.inserting_before(next(iter(graph.nodes))):
            mode = graph.call_function(torch.is_grad_enabled)
        for node in switches:
            node.args = (mode,)


def _replace_size(node: fx.Node, inputs: Sequence[fx.Node]) -> None:
    """A symbolic size is read off the input that has it."""
    if node.users:
        symbol = str(meta_value(node))
        for source in inputs:
            shape = getattr(meta_value(source), "shape", ())
            for axis, size in enumerate(shape):
                if isinstance(size, torch.SymInt) and str(size) == symbol:
                    with node.graph.inserting_before(inputs[-1].next):
                        read = node.graph.call_function(torch.ops.aten.sym_size.int, (source, axis))
                    read.meta["example_value"] = meta_value(node)
                    node.replace_all_uses_with(read)
                    node.graph.erase_node(node)
                    return
        raise FragmentError(f"the graph takes the number {node.name}, which is the size of no tensor among its inputs")
    node.graph.erase_node(node)


def dynamic_axes(inputs: Sequence[fx.Node]) -> dict[int, tuple[int, ...]]:
    """Position of a placeholder -> its axes whose size is a symbol."""
    found = {}
    for position, node in enumerate(inputs):
        shape = getattr(meta_value(node), "shape", ())
        axes = tuple(axis for axis, size in enumerate(shape) if not compat.is_fixed(size))
        if axes:
            found[position] = axes
    return found


# ------------------------------------------------------------------------------------------------ saving
class _Ref(int):
    """A node among pickled arguments: its position in the graph's list."""


class _Operator(str):
    """The name of an operator that does not pickle by reference: an OpOverload or a higher-order operator."""


def _pack(graph: fx.Graph) -> list[tuple[Any, ...]]:
    place = {node: _Ref(position) for position, node in enumerate(graph.nodes)}
    return [
        (node.op, node.name, _pack_target(node.target), *fx.map_arg((node.args, node.kwargs), place.__getitem__))
        for node in graph.nodes
    ]


def _pack_target(target: Any) -> Any:
    if isinstance(target, torch._ops.OpOverload):
        return _Operator(target)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return _Operator(f"higher_order.{target.name()}")
    return target


def _restore(nodes: list[tuple[Any, ...]], values: dict[str, Any], meta: dict[str, Any]) -> StandaloneGraph:
    graph = fx.Graph()
    made: list[fx.Node] = []

    def unpack(value: Any) -> Any:
        return made[value] if isinstance(value, _Ref) else value

    for op, name, target, args, kwargs in nodes:
        if isinstance(target, _Operator):
            target = functools.reduce(getattr, target.split("."), torch.ops)
        args, kwargs = fx.node.map_aggregate((args, kwargs), unpack)
        made.append(graph.create_node(op, target, args, kwargs, name=name))
    result = StandaloneGraph(values, graph)
    result.meta.update(meta)
    return result
