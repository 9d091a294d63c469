"""Pairs beside communication join the table and are kept: what rank 0 has measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from mhc_compile.scheduler import communication, contention
from mhc_compile.scheduler.contention import Alone, Case, Contention, Pair


def test_pairs_of_all_sizes_and_ranks_join_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MHC_COMPILE_CACHE_DIR", str(tmp_path))

    def beside(sides: communication.Sides, tokens: int, width: int, priority: bool, rounds: int) -> object:
        kinds = [case.kind for case in sides(tokens, width)]
        return [
            Pair("communication", kind, tokens * width, priority, 1e-4, 1e-5, 0.9, 0.8, 1.0, 1.0) for kind in kinds
        ], Alone("communication", 4 * tokens * width, tokens * 1e-8)

    def broadcast(box: list[Contention], source: int) -> None:
        assert source == 0

    monkeypatch.setattr(communication, "beside", beside)
    monkeypatch.setattr(communication.dist, "broadcast_object_list", broadcast)

    def sides(tokens: int, width: int) -> Sequence[Case]:
        return [Case("a", lambda: None, 1), Case("b", lambda: None, 1)]

    before = Contention("gpu", (Pair("matmul", "a", 10, False, 1e-4, 1e-5, 0.9, 0.8, 1.0, 2.0),))
    found = communication.together(before, sides, [(1024, 64), (8192, 64)])
    assert len(found.pairs) == 1 + 2 * 2 * 2
    assert found.pair("communication", "b", 8192 * 64, priority=True) is not None
    assert found.pair("communication", "b", 1024 * 64, priority=False) is not None
    assert found.seconds("communication", 4 * 8192 * 64) == pytest.approx(8192e-8)
    assert contention.load("gpu") == found
