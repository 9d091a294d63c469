"""``split_stages``: a converted model cut into the stages of a pipeline, streams and all.

A stage that is made by hand from a model's layers and compiled alone is a model of its own: its streams are collapsed
at its end and begin anew in the next one. Here the whole model is converted first (``standalone``) and its graph is cut
behind sites, so that the stream state [.., n, C] crosses the border and the stages together compute what the whole
does.

    graph = mhc_compile.standalone(model, ids)
    first, second = split_stages(graph, [36])                   # 36 sites in the first stage
    stage = torch.compile(first, backend="mhc", options={"rewrite": False, "recompute": "memory"})

Each stage is planned when it is compiled, from its own graph alone: no block crosses a border, and the state that comes
in is a boundary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mhc_compile import ops
from mhc_compile.capture.graph import meta_value, user_line
from mhc_compile.errors import OptionError
from mhc_compile.standalone import StandaloneGraph, attribute_of, dynamic_axes


def split_stages(graph: StandaloneGraph, sites: Sequence[int]) -> list[StandaloneGraph]:
    """Cut a converted graph behind sites.

    Args:
        graph: what ``standalone`` returns; it stays as it is, and the stages share its parameters and buffers.
        sites: how many sites each stage but the last has.

    Returns:
        The stages, in order. The first takes what the graph takes; each gives a tuple of tensors, which the next one
        takes, and the last gives what the graph gives. What a later stage needs of an earlier one, inputs of the graph
        included, is handed through.

    Raises:
        OptionError: a stage would be empty, or a border lies within a region (of ``no_grad`` or of autocast).
    """
    nodes = list(graph.graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    posts = [node for node in nodes if node.target is ops.post.overload]
    ends = list(itertools.accumulate(sites))
    if not ends or min(sites) < 1 or ends[-1] >= len(posts):
        raise OptionError(
            f"sites={list(sites)} does not leave a site for each of {len(sites) + 1} stages of {len(posts)} sites"
        )
    borders = [order[posts[end - 1]] + 1 for end in ends]
    limits = [0, *borders, len(nodes) - 1]  # the last node is the output
    stages: list[StandaloneGraph] = []
    (output,) = graph.graph.find_nodes(op="output")
    taken = [node for node in nodes if node.op == "placeholder"]
    for number, (start, end) in enumerate(itertools.pairwise(limits)):
        last = number + 2 == len(limits)
        given = output.args[0] if last else _crossing(nodes, order, end)
        inside = [node for node in nodes[start:end] if node.op != "placeholder"]
        stages.append(_stage(graph, taken, inside, given))
        taken = [] if last else list(given)
    return stages


def _crossing(nodes: list[fx.Node], order: dict[fx.Node, int], border: int) -> list[fx.Node]:
    """What is made (or comes in) in front of a border and read behind it, in order; constants are in every stage."""
    region = False
    for node in nodes[:border]:
        if node.target is torch._C._set_grad_enabled:
            region = node.args[0] is False
    crossing = [
        node
        for node in nodes
        if node.op != "get_attr"
        and (order[node] < border or node.op == "placeholder")
        and any(order[user] >= border for user in node.users)
    ]
    if region or not all(isinstance(meta_value(node), Tensor) for node in crossing):
        before = nodes[border - 1]
        raise OptionError(
            "a stage would end within a region of no_grad or autocast, or where something that is no tensor crosses",
            where=user_line(before) or None,
            cure="another number of sites",
        )
    return crossing


def _stage(graph: StandaloneGraph, taken: list[fx.Node], inside: list[fx.Node], given: Any) -> StandaloneGraph:
    """A graph of the nodes `inside` from `taken` to `given`, with the attributes that it reads."""
    new = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in taken:
        made[node] = new.placeholder(node.name)
        made[node].meta = dict(node.meta)
    values: dict[str, Any] = {}

    def source(node: fx.Node) -> fx.Node:
        if node not in made and node.op == "get_attr":
            copy(node)
        return made[node]

    def copy(node: fx.Node) -> None:
        if node.op == "get_attr":
            values[str(node.target)] = attribute_of(graph, str(node.target))
        made[node] = new.node_copy(node, source)

    for node in inside:
        if node.op != "get_attr":
            copy(node)
    new.output(fx.map_arg(tuple(given), source))
    result = StandaloneGraph(values, new)
    result.meta["mhc_dynamic"] = dynamic_axes([made[node] for node in taken])
    new.lint()
    return result
