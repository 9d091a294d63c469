"""What holds for every kernel: it writes all of its results, opcheck of its op, the laws of Sinkhorn on chip.

Under Triton's interpreter (test_interpreter.py) and on a device (test_on_gpu.py)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_compile import ops
from mhc_compile.lowering import sinkhorn
from mhc_compile.ops import SinkhornSpec
from tests.lowering.calls import NAMES, small
from tests.lowering.operands import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned")


def test_what_nobody_writes_is_nan() -> None:
    assert bool(torch.empty(3, device=DEVICE).isnan().all())


def test_every_kernel_is_called_here() -> None:
    assert sorted(small()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    """What the schema says of aliasing and mutation, a fake result that fits the real one, and both once more in a
    graph whose sizes are symbols."""
    tests = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name == "logits_backward_early":
        tests.pop()  # which compares results, and columns of this one's are for another kernel to write
    for arguments in small()[name]:
        overload = getattr(torch.ops.mhc_kernel, name).default
        torch.library.opcheck(overload, arguments, test_utils=tests)


@pytest.mark.parametrize(
    ("n", "positivity", "first", "steps"),
    [
        *((n, "softmax", "column", 40) for n in (2, 3, 4, 8)),
        *((4, positivity, "row", 10) for positivity in ("softmax", "exp", "exp_rowmax", "log", "abs")),
        *((3, positivity, "column", 9) for positivity in ("exp", "exp_rowmax", "log", "abs")),
    ],
)
def test_the_laws_of_sinkhorn(n: int, positivity: str, first: str, steps: int) -> None:
    """The axis normalised last sums to 1, the other one is no worse than in float64, entries are positive, and lines
    that are exchanged before are exchanged behind."""
    log = positivity == "log"
    spec = SinkhornSpec(positivity, 0.0 if log else 1e-6, first, steps)  # type: ignore[arg-type]  # literals
    arguments = spec.op_arguments()
    # exp alone has no maximum to take off: beyond, the quotient of two entries leaves the range of float32.
    limit = 40.0 if positivity == "exp" else 80.0
    logit = st.floats(-limit, limit, width=32)

    @settings(max_examples=10, deadline=None, derandomize=True, database=None)
    @given(st.lists(logit, min_size=n * n, max_size=n * n), st.permutations(range(n)), st.permutations(range(n)))
    def laws(values: list[float], rows: list[int], columns: list[int]) -> None:
        logits = torch.tensor(values, dtype=torch.float32, device=DEVICE).view(1, n, n)
        got = sinkhorn.forward(logits, **arguments)
        exact = ops.sinkhorn.native(logits.double(), **arguments)
        axis = -1 if spec.last == "row" else -2
        assert float((got.sum(axis) - 1).abs().max()) <= 1e-5
        off, exact_off = (float((value.sum(-3 - axis) - 1).abs().max()) for value in (got, exact))
        assert off <= exact_off + 1e-4
        assert float(got.min()) > 0 or (log and float(got.min()) == 0), "float32 ends at exp(-104)"
        turned = sinkhorn.forward(logits[:, rows][:, :, columns].contiguous(), **arguments)
        torch.testing.assert_close(turned, got[:, rows][:, :, columns], rtol=1e-4, atol=1e-6)

    laws()
