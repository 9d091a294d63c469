"""``verify=True``: run the rewritten graph beside the original once, on the real inputs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from mhc_compile.config import Options
from mhc_compile.errors import VerificationError

if TYPE_CHECKING:
    from mhc_compile.convert import Conversion

log = logging.getLogger("mhc_compile")

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def verify(gm: fx.GraphModule, example_inputs: Sequence[Any], conversion: Conversion, options: Options) -> None:
    """Compare the outputs of both graphs in eager mode, without gradients, from the same random state.

    Only a conversion that promises equal numbers can be held to it: one that raises hand-written code, or one whose
    parameters are all new and start function-preserving. Others are skipped with a note in the log.

    Raises:
        VerificationError: an output differs by more than the rounding of its dtype allows.
    """
    values = conversion.parameters.values
    is_new = conversion.report.added["new"] == len(values)
    if values and (options.init != "preserve" or not is_new):
        log.info("verify: skipped, the hyper-connections do not start function-preserving")
        return
    expected = _run(gm, example_inputs)
    actual = _run(conversion.gm, conversion.inputs)
    for index, (want, have) in enumerate(zip(expected, actual, strict=True)):
        tolerance = _TOLERANCE.get(want.dtype)
        if tolerance is None:
            continue
        error = _error(want.double(), have.double())
        if not error <= tolerance:
            raise VerificationError(
                f"output {index} of the rewritten graph differs from the original's by {error:.2e} "
                f"(allowed {tolerance:.0e})",
                cure="please report it with the model; options={'rewrite': False} compiles it as it is",
            )
    log.info("verify: %d outputs agree", len(expected))


def _error(want: torch.Tensor, have: torch.Tensor) -> float:
    """Largest difference relative to the largest entry; what is not finite (masked scores) must agree exactly."""
    finite = want.isfinite()
    if not torch.equal(finite, have.isfinite()) or not torch.equal(
        want[~finite].nan_to_num(), have[~finite].nan_to_num()
    ):
        return float("inf")
    want, have = want[finite], have[finite]
    if not want.numel():
        return 0.0
    return float((want - have).abs().max() / want.abs().max().clamp_min(1e-30))


def _run(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[torch.Tensor]:
    """Run a graph on copies of its inputs (it may write to buffers), leaving the random state as it was."""
    copies = [value.detach().clone() if isinstance(value, torch.Tensor) else value for value in inputs]
    devices = [value.device for value in copies if isinstance(value, torch.Tensor) and value.is_cuda]
    with torch.random.fork_rng(devices=sorted({d.index for d in devices})), torch.no_grad():
        torch.manual_seed(0)
        return list(_tensors(fx.Interpreter(gm).run(*copies)))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
