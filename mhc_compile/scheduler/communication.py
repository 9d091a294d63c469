"""Pairs beside communication: what a side task costs while a collective is on the wire.

Only processes that talk to each other can measure it: ``torchrun --nproc-per-node=2 -m mhc_compile calibrate``, or
``together`` in a program with a process group of NCCL. Without it nothing is placed under a collective.

The collective is an all-reduce of [tokens, channels] in bfloat16. Side tasks are put beside it until they fill half of
its time; M + S is one behind the other, B is both at once (see ``contention``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from . import contention
from .contention import ROUNDS, SIZES, Alone, Case, Contention, Pair
from .main_stream import PRIORITY

Sides = Callable[[int, int], Sequence[Case]]
"""(tokens, channels) -> what may run on the side stream at that size."""


def beside(sides: Sides, tokens: int, width: int, priority: bool, rounds: int = ROUNDS) -> tuple[list[Pair], Alone]:
    """Our kernels while an all-reduce of [tokens, width] is on the wire, against one behind the other; and its time.
    Called by all ranks."""
    main, found = torch.cuda.Stream(priority=PRIORITY if priority else 0), []
    payload = torch.randn(tokens, width, device="cuda").to(torch.bfloat16)
    made = list(sides(tokens, width))
    torch.cuda.synchronize()

    def reduce(*others: Callable[[], object]) -> None:
        work = dist.all_reduce(payload, async_op=True)
        assert work is not None  # async_op
        for call in others:
            call()
        work.wait()

    with torch.cuda.stream(main):
        only = contention.time_alone(Case("communication", reduce, 0), main, rounds)
        for case in made:
            alone = contention.time_alone(case, main, rounds)
            many = max(1, int(0.5 * only / alone))

            def in_a_row(case: Case = case, many: int = many) -> None:
                reduce()
                for _ in range(many):
                    case.call()

            def both(case: Case = case, many: int = many) -> None:
                reduce(*[case.call] * many)

            pairs = contention.compared([in_a_row, both], main, rounds)
            gains = [row - together for row, together in pairs]
            hidden, low, high = (value / (alone * many) for value in contention.interval(gains))
            found.append(Pair("communication", case.kind, case.bytes, priority, only, alone, hidden, low, high, 1.0))
    torch.cuda.synchronize()
    return found, Alone("communication", 2 * payload.numel() * payload.element_size(), only)


def together(
    found: Contention, sides: Sides, sizes: Sequence[tuple[int, int]] = SIZES,
    priorities: Sequence[bool] = (False, True), rounds: int = ROUNDS,
) -> Contention:  # fmt: skip
    """`found` with the pairs beside communication, kept for later processes: what rank 0 has measured, on every rank,
    so that all of them plan alike. Called by all ranks of the default process group, each on its CUDA device."""
    for tokens, width in sizes:
        for priority in priorities:
            pairs, alone = beside(sides, tokens, width, priority, rounds)
            found = replace(found, pairs=(*found.pairs, *pairs))
        found = replace(found, alone=(*found.alone, alone))
    box = [found]
    dist.broadcast_object_list(box, 0)
    contention.save(box[0])
    return box[0]
