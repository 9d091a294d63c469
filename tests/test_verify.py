"""verify=True lets a right rewrite pass and catches a wrong one, without touching model or random state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import mhc_compile.convert
from mhc_compile import ops
from mhc_compile.errors import VerificationError
from mhc_compile.model import hyper_connections
from mhc_compile.passes.base import PassContext, PassResult
from mhc_compile.verify import _error
from tests.tiny import Flat, compiled, ids, tiny


class Noisy(nn.Module):
    """Dropout, a buffer that forward writes to, a mask of -inf and an output that is no float."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop = Flat(2), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.calls += 1
        y = self.drop(self.body(x))
        return y, y.masked_fill(y < 0, float("-inf")), y.argmax(-1)


@pytest.mark.parametrize("variant", ["mhc", "single_pass", "identity", "hc"])
def test_a_right_rewrite_passes(variant: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "mhc_compile"):
        compiled(tiny(layers=1), verify=True, variant=variant)(ids())
    assert "verify: 1 outputs agree" in caplog.text


def test_random_numbers_buffers_and_infinities() -> None:
    model = Noisy()
    call = compiled(model, verify=True)
    state = torch.get_rng_state()
    plain = Noisy()
    torch.set_rng_state(state)
    y, masked, _ = call(torch.randn(2, 3, 16))
    torch.set_rng_state(state)
    plain(torch.randn(2, 3, 16))
    assert model.calls == 1
    assert torch.isneginf(masked).any()
    assert y.shape == (2, 3, 16)


def test_a_planted_error_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        nodes = [n for n in gm.graph.nodes if n.target is ops.pre.overload]
        if len(nodes) == 0:
            return PassResult("spoil")
        first, second = nodes[0], nodes[1]  # the second site reads the streams before the first
        second.args = (first.args[0], *second.args[1:])
        return PassResult("spoil", changed=1)

    monkeypatch.setattr(mhc_compile.convert, "ORDER", [*mhc_compile.convert.ORDER, spoil])
    model = tiny(layers=1)
    keys = list(model.state_dict())
    with pytest.raises(VerificationError, match="output 0"):
        compiled(model, verify=True)(ids())
    assert list(model.state_dict()) == keys
    torch._dynamo.reset()
    compiled(model)(ids())  # not asked, not found
    assert any(hyper_connections(model))


def test_skipped_where_equal_numbers_are_not_promised(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(layers=1)
    with caplog.at_level("INFO", "mhc_compile"):
        compiled(model, verify=True, init="paper")(ids())
        torch._dynamo.reset()
        compiled(model, verify=True)(ids())  # its parameters may be trained
    assert caplog.text.count("verify: skipped") == 2


@pytest.mark.parametrize(
    ("want", "have", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.0, 2.5], 0.25),
        ([], [], 0.0),
        ([0.0], [1e-3], 1e27),
        ([float("-inf"), 1.0], [float("-inf"), 1.0], 0.0),
        ([float("nan")], [float("nan")], 0.0),
        ([float("-inf")], [float("inf")], float("inf")),
        ([1.0], [float("nan")], float("inf")),
        ([float("inf")], [1.0], float("inf")),
    ],
)
def test_error(want: list[float], have: list[float], error: float) -> None:
    got: Any = _error(torch.tensor(want, dtype=torch.float64), torch.tensor(have, dtype=torch.float64))
    assert got == pytest.approx(error)
