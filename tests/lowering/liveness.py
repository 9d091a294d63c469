"""What is live in the lowered forward and backward graphs, in the order of their nodes, with nothing run.

`lowered_graphs` takes a trunk of Qwen3 layers (hidden 2560, FFN 9728, 32/8 heads of 128, bf16, 1 x 4096) through
Dynamo, our passes, AOTAutograd's partitioner and our lowering, and stops there; its weights are never touched.
Attention stands in as an op with flash attention's inputs, results and backward. `peak_of` walks a graph: a value is
live from the node that makes it to its last reader, as inductor's wrapper frees it; element-wise values that only
element-wise nodes read are fused away, and what they read lives until the kernel they are fused into.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, fx, nn

from mhc_compile.config import resolve
from mhc_compile.convert import Conversion, convert
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.lowering.inductor import LowerPass
from mhc_compile.lowering.logits_alone import leave

TOKENS = 4096


@torch.library.custom_op("mhc_test::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    raise RuntimeError("this op has shapes only")


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, width = q.shape
    return q.new_empty((batch, tokens, heads, width)).transpose(1, 2), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("mhc_test::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    raise RuntimeError("this op has shapes only")


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


_attention.register_autograd(lambda ctx, grad, _: _attention_backward(grad, *ctx.saved_tensors), setup_context=_setup)


def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """In place of scaled_dot_product_attention."""
    return _attention(q, k, v)[0]


@dataclasses.dataclass
class Lowered:
    """The two graphs of one training step, and what led to them."""

    forward: fx.Graph
    backward: fx.Graph
    conversion: Conversion
    log: LoweringLog


class _Stop(Exception):
    """Everything that is wanted is there."""


WIDE = {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128}  # fmt: skip
NARROW = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1,
          "head_dim": 32}  # fmt: skip
"""Streams beside which the coefficients of a token, 24 numbers in float32, are not small."""


def trunk(layers: int, shape: dict[str, int]) -> nn.Module:
    """Qwen3 layers with memory that is reserved and never touched."""
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(**shape, num_hidden_layers=layers, vocab_size=1024, use_cache=False)
    with torch.device("meta"):
        model = Qwen3Model(config).to(torch.bfloat16)
    return model.to_empty(device="cpu").train()


def lowered_graphs(layers: int, shape: dict[str, int] = WIDE, **options: Any) -> Lowered:
    """The graphs with kernels, for a process with Triton's interpreter; `fold_norms` has to be allowed on the CPU."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    found: list[Lowered] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        resolved = resolve(options, None)
        conversion = convert(gm, inputs, resolved)
        for node in conversion.gm.graph.nodes:
            if node.target is functional.scaled_dot_product_attention:
                node.target = attention
        conversion.gm.recompile()

        def partition(joint: fx.GraphModule, joint_inputs: Any, **settings: Any) -> Any:
            leave(joint.graph)
            pair = min_cut_rematerialization_partition(joint, joint_inputs, **settings)
            log = LoweringLog()
            for part in pair:
                LowerPass(resolved.options, log)(part.graph)
            found.append(Lowered(pair[0].graph, pair[1].graph, conversion, log))
            raise _Stop

        return aot_autograd(fw_compiler=None, partition_fn=partition, decompositions=select_decomp_table())(
            conversion.gm, conversion.inputs
        )

    torch._dynamo.reset()
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    try:
        # A mask of None a layer kind is the causal flash path.
        torch.compile(trunk(layers, shape), backend=backend, fullgraph=True)(
            input_ids=ids, attention_mask={"full_attention": None}, use_cache=False
        )
    except Exception:
        if not found:
            raise
    return found[0]


# ------------------------------------------------------------------------------------------------ the walk
_VIEWS = frozenset(
    "view reshape _unsafe_view permute transpose t expand unsqueeze squeeze slice select alias detach split "
    "split_with_sizes unbind as_strided".split()
)
_WHOLE = ("mm", "addmm", "bmm", "embedding_dense_backward", "index_put")
_REDUCTIONS = ("sum", "mean", "amax", "var_mean", "prod", "var")


def _kind(node: fx.Node) -> str:
    """input, output, item (of several results), whole (a call that reads and writes tensors), view, sum or point."""
    if node.op in ("placeholder", "get_attr"):
        return "input"
    if node.op == "output":
        return "output"
    if node.target is operator.getitem:
        return "item"
    assert isinstance(node.target, torch._ops.OpOverload), node.target
    name = node.target.overloadpacket.__name__
    if node.target.namespace in ("mhc_kernel", "mhc", "mhc_test") or name.startswith(_WHOLE):
        return "whole"
    return "view" if name in _VIEWS else "sum" if name in _REDUCTIONS else "point"


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


class _Values:
    """Which values of a graph are tensors in memory, and how long each of them lives."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.index = {node: index for index, node in enumerate(self.nodes)}
        self.kinds = {node: _kind(node) for node in self.nodes}
        self.last: dict[fx.Node, int] = {}
        for node in self.nodes:
            if self._written(node) or self.kinds[node] == "output":
                for source in node.all_input_nodes:
                    self._read(source, self.index[node])

    def _readers(self, node: fx.Node) -> Iterator[fx.Node]:
        for user in node.users:
            if self.kinds[user] == "view":
                yield from self._readers(user)
            else:
                yield user

    def _written(self, node: fx.Node) -> bool:
        """True where a kernel writes the value of a node."""
        if self.kinds[node] == "point":
            return any(self.kinds[user] in ("whole", "output") for user in self._readers(node))
        return self.kinds[node] in ("whole", "sum", "item", "input")

    def _read(self, node: fx.Node, index: int) -> None:
        while self.kinds[node] == "view":
            node = node.all_input_nodes[0]
        if not self._written(node):
            for source in node.all_input_nodes:
                self._read(source, index)
            return
        self.last[node] = max(self.last.get(node, -1), index)

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """(bytes, first index, last index) of every tensor; inputs that are views of one another are one."""
        inputs: dict[int, list[fx.Node]] = defaultdict(list)
        for node in self.nodes:
            kind, value, index = self.kinds[node], node.meta.get("val"), self.index[node]
            if kind == "input" and isinstance(value, Tensor):
                inputs[value.untyped_storage()._cdata].append(node)
            elif kind in ("whole", "sum", "point") and isinstance(value, Tensor) and self._written(node):
                yield _bytes(value), index, self.last.get(node, index)
            elif kind == "whole":  # several results
                lasts = {user.args[1]: self.last.get(user, self.index[user]) for user in node.users}
                for place, part in enumerate(value or ()):
                    yield _bytes(part), index, lasts.get(place, index)
        for nodes in inputs.values():
            kept = any(node.name.startswith("primals") for node in nodes)  # the caller's
            size = max(_bytes(node.meta["val"]) for node in nodes)
            yield size, 0, len(self.nodes) if kept else max(self.last.get(node, 0) for node in nodes)


def peak_of(graph: fx.Graph) -> int:
    """Most bytes that are live at once while a graph runs."""
    steps: dict[int, int] = defaultdict(int)
    for size, first, last in _Values(graph).spans():
        steps[first] += size
        steps[last + 1] -= size
    total = most = 0
    for index in sorted(steps):
        total += steps[index]
        most = max(most, total)
    return most
