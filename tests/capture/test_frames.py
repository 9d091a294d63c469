from __future__ import annotations

from torch import Tensor, nn

from mhc_compile.capture.frames import enclosing_modules, is_running, is_transparent
from tests.tiny import Block


class Probe(nn.Module):
    """Writes down who is calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen = enclosing_modules([self])
        return x


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_callers_that_hold_the_root_innermost_first() -> None:
    probe = Probe()
    middle = Outer(probe)
    outer = Outer(middle)
    outer(Tensor())
    assert probe.seen == [middle, outer]


def test_nobody_around() -> None:
    probe = Probe()
    probe(Tensor())
    assert probe.seen == []


def test_a_module_that_does_not_hold_the_root_is_none() -> None:
    probe = Probe()

    class Stranger(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return probe(x)

    Stranger()(Tensor())
    assert probe.seen == []


def test_wrappers_that_only_pass_the_call_on() -> None:
    import torch

    assert is_transparent(torch.compile(Block(), backend="eager"))
    assert not is_transparent(Block())


def test_a_method_that_runs_uncompiled_and_calls_a_helper() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> bool:
            return self.helper(x)

        def helper(self, x: Tensor) -> bool:
            return is_running([self])

    model = Model()
    assert model(Tensor())
    assert not is_running([Model()])
    assert not is_running([])
