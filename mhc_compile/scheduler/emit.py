"""Fork and join: how one call of a compiled graph runs on a side stream, and why that is safe.

A moved call ``y = op(a, b, 2)`` becomes two nodes:

    held = mhc_stream::fork([a, b], call, slot)      launches op on the side stream; returns a and b again
    y    = mhc_stream::join(held, after, call, slot) the main stream waits for it; returns op's results

``call`` is the op and its arguments as text, so that the artefact can be kept on disk and loaded by another process.
``slot`` tells the calls of one graph apart. Both run at the place where inductor's code calls them; inductor sees
two opaque calls and knows nothing of streams. Further tensors may pass through both, to keep the order (``move``).
What could go wrong, and what rules it out:

* *Inductor gives an input's buffer to another kernel while the side stream still reads it* (it frees a buffer behind
  its last use in program order, and even writes in place). The schema of ``fork`` says that its results alias its
  inputs, ``Tensor(a)[] -> Tensor(a)[]``, and ``join`` takes these results. So every buffer that is in fact passed to
  ``fork``, also one that inductor copied for this call alone, counts as used until ``join``: it is neither reused nor
  updated in place before. A mutation of a graph input waits for ``join`` for the same reason.
* *The caching allocator hands out an input's memory.* The tensors are held from ``fork`` to ``join`` (``_Pending``).
* *It hands out the results' memory.* They come from the side stream's pool. Each fork makes the side stream wait for
  everything that the main stream was given before, and ``join`` records the main stream on the results, so that a
  block freed later is reused only when the main stream is done with it.
* *A result is read too early.* It leaves ``join`` only, behind the main stream's wait.
* *A CUDA graph is captured.* Event and wait are edges of the graph; the side stream has joined before the capture ends.
  Blocks of a graph's private pool are handed out by order of launch, which the forks make an order of time:
  ``record_stream`` is left out there (it would keep every such block for the rest of the capture).
* *The host fails between the two.* The next fork of the slot drops what was pending.

On a CPU the same two nodes run the op at ``fork``. Within ``deferred()`` they run it at ``join`` instead, on the very
memory that ``fork`` was given: the latest moment that a side stream could read it. Equal results at both ends show that
nothing touched that memory in between (``tests/scheduler/test_emit.py``).
"""

from __future__ import annotations

import contextlib
import functools
import json
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mhc_compile.cost import is_view

from .dag import is_opaque

_LIBRARY = torch.library.Library("mhc_stream", "DEF")
_LIBRARY.define(
    "fork(Tensor(a)[] inputs, str call, int slot) -> Tensor(a)[]", tags=(torch.Tag.needs_exact_strides,)
)  # the strides that op would have been given; see the first point above for the copies that this can mean
_LIBRARY.define(
    "join(Tensor[] held, Tensor[] after, str call, int slot) -> Tensor[]", tags=(torch.Tag.flexible_layout,)
)


# ------------------------------------------------------------------------------------------------ a call as text
def encode(node: fx.Node) -> tuple[str, list[fx.Node]]:
    """(text, tensor inputs) of a call whose arguments are tensors, numbers, texts, dtypes and lists of them.

    Raises ValueError, with the reason, for any other.
    """
    inputs: list[fx.Node] = []

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            if not isinstance(value.meta.get("val"), Tensor):
                raise ValueError(f"argument {value} is no tensor")
            if value not in inputs:
                inputs.append(value)
            return {"input": inputs.index(value)}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise ValueError(f"an argument of type {type(value).__name__} cannot be kept as text")

    if not isinstance(node.target, torch._ops.OpOverload):
        raise ValueError(f"{node} does not call an operator overload")
    schema = node.target._schema
    if schema.is_mutable or any(item.alias_info is not None for item in schema.returns):
        raise ValueError(f"{node.target} writes to an argument or returns a view of one")
    named = {name: plain(value) for name, value in node.kwargs.items()}
    text = json.dumps([str(node.target), [plain(value) for value in node.args], named])
    if not inputs:
        raise ValueError(f"{node} has no tensor argument")
    return text, inputs


@functools.lru_cache(maxsize=4096)
def _decode(call: str) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
    name, args, kwargs = json.loads(call)
    target: Any = torch.ops
    for part in name.split("."):
        target = getattr(target, part)
    return target, args, kwargs


def run_call(call: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The results of a call, as a list also where it has one."""
    target, args, kwargs = _decode(call)

    def value(item: Any) -> Any:
        if isinstance(item, dict):
            return inputs[item["input"]] if "input" in item else getattr(torch, item["dtype"])
        return [value(inner) for inner in item] if isinstance(item, list) else item

    results = target(*map(value, args), **{name: value(item) for name, item in kwargs.items()})
    return [results] if isinstance(results, Tensor) else list(results)


# ------------------------------------------------------------------------------------------------ at run time
@dataclass
class _Pending:
    """What a fork holds for its join."""

    call: str
    inputs: list[Tensor]
    results: list[Tensor] | None
    """None: to be computed at the join (``deferred``)."""
    done: Any = None
    """The event behind the side stream's work; None on a CPU."""


class _Thread(threading.local):
    """What is pending on one thread, by slot. A thread runs one graph at a time, and slots are unique in a graph."""

    def __init__(self) -> None:
        self.pending: dict[int, _Pending] = {}


@dataclass
class _Mode:
    """For tests and benchmarks; of the process, because a backward runs on a thread of autograd's."""

    deferred: bool = False
    side_delay: int = 0
    main_delay: int = 0


_thread = _Thread()
_mode = _Mode()
_streams: dict[int, Any] = {}


def side_stream(device: int) -> Any:
    """The side stream of a CUDA device, of the least priority; one for the process.

    It is one of torch's pool, where a user's stream may be the same one: then their work is in one row, still correct.
    """
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device, priority=0)
    return _streams[device]


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within it, moved calls run at their join: the latest that a side stream could be."""
    before, _mode.deferred = _mode.deferred, True
    try:
        yield
    finally:
        _mode.deferred = before


@contextlib.contextmanager
def delayed(side: int = 0, main: int = 0) -> Iterator[None]:
    """Within it, a stream sleeps for so many GPU cycles at each fork: a race between the two shows if there is one."""
    before = _mode.side_delay, _mode.main_delay
    _mode.side_delay, _mode.main_delay = side, main
    try:
        yield
    finally:
        _mode.side_delay, _mode.main_delay = before


def _fork(inputs: list[Tensor], call: str, slot: int) -> list[Tensor]:
    _thread.pending.pop(slot, None)
    inputs = list(inputs)
    device = inputs[0].device
    if _mode.deferred:
        _thread.pending[slot] = _Pending(call, inputs, None)
    elif device.type != "cuda":
        _thread.pending[slot] = _Pending(call, inputs, run_call(call, inputs))
    else:
        side = side_stream(device.index)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            if _mode.side_delay:
                torch.cuda._sleep(_mode.side_delay)
            results = run_call(call, inputs)
        _thread.pending[slot] = _Pending(call, inputs, results, side.record_event())
        if _mode.main_delay:
            torch.cuda._sleep(_mode.main_delay)
    return inputs


def _join(held: list[Tensor], after: list[Tensor], call: str, slot: int) -> list[Tensor]:
    pending = _thread.pending.pop(slot, None)
    if pending is None or pending.call != call:
        raise RuntimeError(f"the side stream's call {slot} was not started by this graph")
    if pending.results is None:
        return run_call(call, pending.inputs)
    if pending.done is not None:
        main = torch.cuda.current_stream(pending.inputs[0].device)
        main.wait_event(pending.done)
        if not torch.cuda.is_current_stream_capturing():
            for result in pending.results:
                result.record_stream(main)
    return pending.results


def _fork_fake(inputs: list[Tensor], call: str, slot: int) -> list[Tensor]:
    return list(inputs)


def _join_fake(held: list[Tensor], after: list[Tensor], call: str, slot: int) -> list[Tensor]:
    return run_call(call, held)


for _name, _body, _fake in (("fork", _fork, _fork_fake), ("join", _join, _join_fake)):
    _LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mhc_stream::{_name}", _fake, lib=_LIBRARY)

FORK = torch.ops.mhc_stream.fork.default
JOIN = torch.ops.mhc_stream.join.default


# ------------------------------------------------------------------------------------------------ in the graph
def gate_argument(consumer: fx.Node, position: dict[fx.Node, int], before: int) -> fx.Node | None:
    """A tensor argument of `consumer` that is there at `before` and in memory anyway; None if there is none.

    A graph input, a result of an opaque call, or a view of one: passing it through a fork copies nothing. Not what has
    passed through another fork: that one's inputs would be held until this one's join.
    """
    for argument in consumer.all_input_nodes:
        base = argument
        while is_view(base) and base.all_input_nodes:
            base = base.all_input_nodes[0]
        in_memory = base.op == "placeholder" or (is_opaque(base) and base.target is not FORK)
        if in_memory and position[argument] < before and isinstance(argument.meta.get("val"), Tensor):
            return argument
    return None


def move(
    node: fx.Node,
    fork_before: fx.Node,
    join_before: fx.Node,
    slot: int,
    gate: tuple[fx.Node, fx.Node] | None = None,
    after: Sequence[fx.Node] = (),
) -> fx.Node:
    """Replace a call by a fork and a join at the places given; returns the join.

    Args:
        node: a call of an operator overload with tensor results.
        fork_before: all inputs of `node` stand before it.
        join_before: no user of `node` stands before it.
        slot: unique in the graph.
        gate: (a call of the main stream behind the fork, one of its arguments that stands before the fork). The
            argument reaches the call through the fork, so that inductor, which orders calls for the least memory, does
            not put the fork behind it.
        after: tensors that the main stream makes before the join is wanted, for the same reason.

    Raises ValueError where `encode` does, or if a result is no tensor; the graph is then as it was.
    """
    graph, value = node.graph, node.meta["val"]
    several = isinstance(value, (tuple, list))
    if not all(isinstance(item, Tensor) for item in (value if several else [value])):
        raise ValueError(f"{node} returns something else than tensors")
    if several and any(user.target is not operator.getitem for user in node.users):
        raise ValueError(f"{node} has several results and they are taken whole")
    call, inputs = encode(node)
    passed = [*inputs, gate[1]] if gate is not None else inputs
    fakes = [item.meta["val"] for item in passed]
    held = []
    with graph.inserting_before(fork_before):
        fork = graph.call_function(FORK, (list(passed), call, slot))
        fork.meta["val"] = fakes
        if "eager_input_vals" in node.meta:  # by them inductor gives a custom op the strides that it was traced with
            fork.meta["eager_input_vals"] = ((fakes, call, slot), {})
        for index, fake in enumerate(fakes):
            item = graph.call_function(operator.getitem, (fork, index))
            item.meta["val"] = fake
            held.append(item)
    if gate is not None:
        gate[0].replace_input_with(gate[1], held[-1])
    with graph.inserting_before(join_before):
        join = graph.call_function(JOIN, (held[: len(inputs)], list(after), call, slot))
        join.meta["val"] = list(value) if several else [value]
        results = []
        for index, fake in enumerate(join.meta["val"]):
            item = graph.call_function(operator.getitem, (join, index))
            item.meta["val"] = fake
            results.append(item)
    for new in (fork, *held, join, *results):
        for key in ("stack_trace", "nn_module_stack", "seq_nr"):
            if key in node.meta:
                new.meta[key] = node.meta[key]
    if several:
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]  # the index of a getitem is an int
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(results[0])
    graph.erase_node(node)
    return join
