from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointPolicy

from mhc_compile.cost import bytes_of, target_name
from mhc_compile.passes.activations import Kept, _attention_workspace, kept_by_autograd, live_bytes
from mhc_compile.passes.states import find_states

WIDTH, INNER = 8, 24


class Gated(nn.Module):
    """A feed-forward as of Llama: three matmuls and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(-2))


def graph_of(module: nn.Module) -> fx.Graph:
    graphs: list[fx.GraphModule] = []
    torch._dynamo.reset()
    x = torch.randn(2, 5, WIDTH)
    torch.compile(module, backend=lambda gm, _: graphs.append(gm) or gm.forward)(x)
    return graphs[0].graph


def is_parameter(node: fx.Node) -> bool:
    return node.op == "placeholder" and "parameters" in node.name


def names(kept: list[Kept]) -> list[str]:
    return sorted(target_name(value.node) for value in kept)


def test_a_gated_feed_forward_keeps_gate_up_and_their_product() -> None:
    kept = kept_by_autograd(graph_of(Gated()), is_parameter)
    assert names(kept) == ["linear", "linear", "mul", "placeholder"]
    assert sum(value.bytes for value in kept) == 2 * 5 * (3 * INNER + WIDTH) * 4


def test_attention_keeps_queries_keys_values_result_and_row_sums() -> None:
    kept = kept_by_autograd(graph_of(Attention()), is_parameter)
    sizes = {target_name(value.node): value.bytes for value in kept}
    assert sizes["linear"] == 2 * 5 * 3 * WIDTH * 4  # q, k and v are views of one value
    assert sizes["scaled_dot_product_attention"] == 2 * 5 * WIDTH * 4 + 2 * 5 * 2 * 4


def test_what_a_checkpoint_covers_is_not_kept() -> None:
    graph = graph_of(Gated())
    for node in graph.nodes:
        if node.op != "placeholder":
            node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    assert names(kept_by_autograd(graph, is_parameter)) == ["placeholder"]


class Chain(nn.Module):
    """Two sites of our ops around gated feed-forwards, gates that are no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Gated(), Gated()])
        self.register_buffer("gates", torch.full((2, 5, 4), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        streams = torch.ops.mhc.expand.default(x, 4)
        for layer in self.layers:
            y = layer(torch.ops.mhc.pre.default(streams, self.gates))
            streams = torch.ops.mhc.post.default(streams, y, self.gates, None, False)
        return torch.ops.mhc.collapse.default(streams, "mean")


def test_what_is_live_at_the_worst_moment_of_each_site() -> None:
    """By hand: the feed-forward's gate, when five of its inner values are there at once."""
    graph = graph_of(Chain())
    (states,) = find_states(graph)
    unit, inner = 2 * 5 * WIDTH * 4, 2 * 5 * INNER * 4  # bytes of [.., C] and of an inner value
    weight, state = WIDTH * INNER * 4, 4 * unit
    without = {pre for each in states for pre in each.pres} | {each.output for each in states}
    kept = kept_by_autograd(graph, is_parameter, without)
    assert sum(value.bytes for value in kept) == 2 * 3 * inner  # gate, up and product of each
    live = live_bytes(graph, states, is_parameter, kept, [(7, unit)] * 2, "cpu", workspace=1000)
    given = sum(bytes_of(node) for node in graph.find_nodes(op="placeholder"))
    (output,) = graph.find_nodes(op="output")
    fixed = 1000 + given + sum(bytes_of(node) for node in output.all_input_nodes)
    assert live.head == fixed + sum(value.bytes for value in kept) + 2 * (7 + unit) + unit + state  # d(output), dX_2
    alike = live_bytes(graph, states, is_parameter, kept, [(7, unit)] * 2, "cpu", workspace=1000, last=unit)
    assert live.head - alike.head == state - unit  # where kernels read one row for all streams
    # gate and up, and the gradients of gate, up and product; the gradient of the state behind; the weight's of down
    fused = 5 * inner + state + weight
    assert live.sites[0] == fixed + fused + 7 + 3 * weight
    assert live.sites[1] == fixed + fused + 2 * 7 + 3 * inner + unit  # and what the site below has kept
    # the gradients of the state behind and of the state itself, of the branch input; three weights each
    assert live.borders[1] == fixed + 2 * state + unit + 2 * 7 + 3 * inner + unit + 3 * weight
    assert live.borders[0] == 0 or live.borders[0] <= live.sites[0]


def test_attention_has_a_workspace_of_its_own_on_a_gpu() -> None:
    graph = graph_of(nn.Sequential(Attention()))
    kept = kept_by_autograd(graph, is_parameter)
    cpu, gpu = (live_bytes(graph, [], is_parameter, kept, [], kind) for kind in ("cpu", "cuda"))
    assert cpu.head == gpu.head  # nothing runs there
    (node,) = [node for node in graph.nodes if "scaled_dot_product" in target_name(node)]
    assert _attention_workspace(node) == 2 * 5 * WIDTH * 4


@pytest.mark.parametrize("module", [Gated, Attention])
def test_the_estimate_is_near_what_the_partitioner_keeps(module: type[nn.Module]) -> None:
    """Within a tenth of the min-cut partition, weights and their views left out."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    saved: list[int] = []

    def see(gm: fx.GraphModule, _: Any) -> Any:
        (output,) = gm.graph.find_nodes(op="output")
        storages = {}
        for node in output.args[0][1:]:
            value = node.meta["val"]
            if isinstance(value, Tensor) and (node.op != "placeholder" or value.dim() == 3):
                base = value.untyped_storage()._cdata
                storages[base] = value.untyped_storage().nbytes()
        saved.append(sum(storages.values()))
        return make_boxed_func(gm.forward)

    net = nn.Sequential(module(), module())
    estimate = sum(value.bytes for value in kept_by_autograd(graph_of(net), is_parameter))
    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=see,
        bw_compiler=lambda gm, _: make_boxed_func(gm.forward),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    torch.compile(net, backend=backend)(torch.randn(2, 5, WIDTH)).sum().backward()
    assert estimate == pytest.approx(saved[0], rel=0.1)
