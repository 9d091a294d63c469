"""What a node does to a residual stream that passes through it: the finder's reading of single operations.

The roles are about mathematics, not about spellings. Along a stream, an operation is *linear* (casts, layout, scaling,
masking, adding something from outside: it can be applied to every stream alike and leaves equal streams equal),
*norm* or *non-linear* (it would change what the mix means), or *weighted* (a product with parameters: not a stream any
more). Whatever is not known counts as non-linear, which cuts a chain but never converts it wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from mhc_compile.capture.graph import meta_value
from mhc_compile.capture.mutation import op_name

LINEAR, NORM, NONLINEAR, WEIGHTED, RANDOM = "linear", "norm", "non-linear", "weighted", "random"

UNARY_LINEAR = frozenset(
    """
    to float half bfloat16 double type type_as contiguous clone detach alias identity view reshape view_as
    reshape_as flatten unflatten permute transpose swapaxes swapdims movedim moveaxis t squeeze unsqueeze expand
    expand_as repeat repeat_interleave tile getitem __getitem__ select narrow index_select gather take_along_dim
    roll flip pad constant_pad_nd split chunk tensor_split unbind neg masked_fill index unfold pixel_shuffle
    pixel_unshuffle avg_pool1d avg_pool2d _to_copy convert_element_type ravel broadcast_to requires_grad_
    getattr adjoint mT
    """.split()
)
_LIKE = frozenset(
    """
    to type_as view_as reshape_as expand_as
    """.split()
)
"""Operators that take shape or dtype from a second tensor, and nothing else."""
_SCALING = frozenset(
    """
    mul imul __mul__ __rmul__ __imul__ mul_ multiply div truediv __truediv__ divide div_ itruediv
    """.split()
)
_ADDING = frozenset(
    """
    add iadd __add__ __radd__ __iadd__ add_ sub isub __sub__ sub_ subtract
    """.split()
)
_JOINING = frozenset(
    """
    cat concat concatenate stack where set_item index_put index_copy index_add scatter masked_scatter index_fill
    slice_scatter select_scatter
    """.split()
)
_DROPOUT = frozenset(
    """
    dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout dropout_ native_dropout
    """.split()
)
_NORMS = frozenset(
    """
    layer_norm rms_norm group_norm batch_norm instance_norm normalize native_layer_norm _fused_rms_norm
    local_response_norm
    """.split()
)
_CHANNEL_FIRST = frozenset(
    """
    conv1d conv2d conv3d conv_transpose2d batch_norm group_norm instance_norm
    """.split()
)
_ELEMENTWISE = (
    _SCALING
    | _ADDING
    | _JOINING
    | _NORMS
    | frozenset(
        """
    pow sqrt rsqrt exp log sigmoid tanh silu gelu relu softplus maximum minimum where lerp addcmul addcdiv prelu eq
    ne lt le gt ge sum mean softmax squeeze masked_fill clamp copy_ norm
    """.split()
    )
)
_STEP_OF_A_NORM = frozenset(
    """
    rsqrt sqrt norm vector_norm var std var_mean
    """.split()
)

SUMS = frozenset(
    """
    add iadd __add__ __radd__ __iadd__ add_
    """.split()
)


class Roles:
    """Reads the roles of the nodes of one graph.

    Args:
        is_parameter: True for a placeholder that is a parameter or a buffer.
        is_buffer: True for those that are buffers: constants, but no weights (a rotation matrix, a filter).
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        is_parameter: Callable[[fx.Node], bool],
        is_buffer: Callable[[fx.Node], bool] = lambda node: False,
    ) -> None:
        self.constant: set[fx.Node] = set()
        """Nodes that depend on parameters and constants only."""
        self.weight: set[fx.Node] = set()
        """Parameters, what is made of them alone, and gathers of them by activations (expert weights)."""
        self._is_parameter, self._is_buffer = is_parameter, is_buffer
        for node in gm.graph.nodes:
            self._classify(node)

    def _classify(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if self._is_parameter(node):
                self.constant.add(node)
                if not self._is_buffer(node):
                    self.weight.add(node)
            return
        if node.op == "get_attr":
            self.constant.add(node)
            if isinstance(meta_value(node), torch.Tensor):
                self.weight.add(node)
            return
        if all(arg in self.constant for arg in node.all_input_nodes):
            self.constant.add(node)
            if any(arg in self.weight for arg in node.all_input_nodes):
                self.weight.add(node)  # a weight standardised, merged or otherwise made of weights
        first = node.args[0] if node.args else None
        if isinstance(first, fx.Node) and first in self.weight and op_name(node) in UNARY_LINEAR:
            self.weight.add(node)

    def activations(self, node: fx.Node) -> list[fx.Node]:
        """Tensor inputs of a node that are no parameters and no constants, each once."""
        return [a for a in node.all_input_nodes if a not in self.constant and _is_tensor_like(meta_value(a))]

    def values(self, node: fx.Node) -> list[fx.Node]:
        """The activations whose values enter the result: of ``x.view_as(y)`` and ``x.to(y)`` only x."""
        inputs = self.activations(node)
        return [a for a in inputs if a is node.args[0]] if op_name(node) in _LIKE and node.args else inputs

    def is_weighted(self, node: fx.Node) -> bool:
        """True for a product of activations with a parameter of two or more dimensions (linear, conv, expert GEMM)."""
        if node.op not in ("call_function", "call_method") or op_name(node) in _ELEMENTWISE | UNARY_LINEAR:
            return False
        has_weight = any(
            arg in self.weight
            and isinstance(v := meta_value(arg), torch.Tensor)
            and v.dim() >= 2
            and v.is_floating_point()
            for arg in node.all_input_nodes
        )
        return has_weight and (bool(self.activations(node)) or op_name(node) == "embedding")

    def role(self, node: fx.Node) -> str:
        """The role of a node for the activations that enter it."""
        name = op_name(node)
        if self.is_weighted(node):
            return WEIGHTED
        inputs = self.values(node)
        if name in _DROPOUT:
            return LINEAR if _dropout_is_off(node) else RANDOM
        if name in UNARY_LINEAR:
            # an index that depends on activations (token routing) is data, not stream
            return LINEAR if _reads_first(node, inputs) else NONLINEAR
        if name in _ADDING or name in _JOINING:
            return LINEAR
        if name in _SCALING:
            if len(inputs) == 1 and sum(arg is inputs[0] for arg in node.args) > 1:
                return NONLINEAR  # x * x
            denominator = name in ("div", "truediv", "__truediv__", "divide", "div_", "itruediv")
            if denominator and len(node.args) > 1 and node.args[1] in inputs and node.args[1] is not node.args[0]:
                return LINEAR if len(inputs) == 2 else NONLINEAR
            return LINEAR
        if name in _NORMS or name in _STEP_OF_A_NORM:
            return NORM
        return NONLINEAR

    def images(self, source: fx.Node, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """``source`` and what among ``nodes`` (given in graph order) it passes through by linear operations.

        Adding anything to an image leaves an image; a product of two values that depend on ``source`` is none.
        """
        derived, linear = {source}, {source}
        for node in nodes:
            inputs = [arg for arg in self.values(node) if arg in derived]
            if not inputs or node is source:
                continue
            derived.add(node)
            product = len(inputs) > 1 and op_name(node) not in _ADDING | _JOINING
            if not product and self.role(node) == LINEAR and any(arg in linear for arg in inputs):
                linear.add(node)
        return linear

    def strip(self, node: fx.Node, stop: Callable[[fx.Node], bool]) -> list[fx.Node]:
        """``node`` and what it was before unary linear operations, nearest first, ending where ``stop`` holds.

        Adding a parameter is one of them: ``(x + bias) * scale`` is still the stream x.
        """
        found = [node]
        while not stop(node) and node.op in ("call_function", "call_method"):
            inputs = self.values(node)
            if len(inputs) != 1 or self.role(node) != LINEAR or op_name(node) in _JOINING:
                break
            if op_name(node) in _ADDING and len(node.all_input_nodes) < 2:
                break  # 0 + x begins a sum
            node = inputs[0]
            found.append(node)
        return found


def summands(node: fx.Node) -> tuple[tuple[fx.Node, float], tuple[fx.Node, float]] | None:
    """The two tensor operands of an add with their factors (``alpha``); None if the node adds no two tensors."""
    if op_name(node) not in SUMS or len(node.args) < 2:
        return None
    left, right = node.args[0], node.args[1]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        return None
    a, b, out = meta_value(left), meta_value(right), meta_value(node)
    if not all(isinstance(v, torch.Tensor) for v in (a, b, out)) or out.dim() < 2:
        return None
    alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
    if not isinstance(alpha, (int, float)):
        return None
    return (left, 1.0), (right, float(alpha))


def channel_axis(node: fx.Node, within: set[fx.Node], roles: Roles, depth: int = 0) -> int | None:
    """Axis (from the end, negative) that the first layers of the branch treat as channels; None if they do not say."""
    value = meta_value(node)
    if not isinstance(value, torch.Tensor) or depth > 12:
        return None
    rank = value.dim()
    for user in node.users:
        if user not in within:
            continue
        name = op_name(user)
        if name in _CHANNEL_FIRST:
            return 1 - rank if rank >= 3 else -1
        if roles.is_weighted(user) or name in ("layer_norm", "rms_norm"):
            return -1
        out = meta_value(user)
        if not isinstance(out, torch.Tensor):
            continue
        axis = channel_axis(user, within, roles, depth + 1)
        if axis is None:
            continue
        if name in ("permute", "transpose", "movedim", "swapaxes"):
            origin = _origin_of_axis(user, value, axis % out.dim())
            if origin is not None:
                return origin - rank
        elif name == "flatten":
            start = user.args[1] if len(user.args) > 1 else user.kwargs.get("start_dim", 0)
            if isinstance(start, int) and axis % out.dim() < start % rank:
                return axis % out.dim() - rank
        elif tuple(out.shape) == tuple(value.shape) or axis == -1:
            return axis
    return None


def _origin_of_axis(node: fx.Node, value: torch.Tensor, axis: int) -> int | None:
    """The input axis that a permutation puts at output position ``axis``: read off a probe with distinct strides."""
    probe = torch.empty(tuple(range(2, 2 + value.dim())), device="meta")
    args = node.args[1:]
    if any(isinstance(a, fx.Node) for a in node.all_input_nodes[1:]):
        return None
    function: Any = getattr(torch.Tensor, op_name(node), None)
    if function is None:
        return None
    return int(function(probe, *args, **node.kwargs).shape[axis]) - 2


def _is_tensor_like(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    return isinstance(value, (tuple, list)) and any(isinstance(v, torch.Tensor) for v in value)


def _reads_first(node: fx.Node, inputs: Iterable[fx.Node]) -> bool:
    first = node.args[0] if node.args else None
    return all(arg is first or not _is_float(meta_value(arg)) for arg in inputs)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _dropout_is_off(node: fx.Node) -> bool:
    probability = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", node.kwargs.get("train", True))
    return training is False or (isinstance(probability, (int, float)) and probability == 0)
