"""What a converted model must show: the plain model's numbers at step 0, then training steps that move everything.

Used for the hand-written entries (``tests/test_architectures.py``) and for the wide zoo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile.backend import reports
from mhc_compile.model import hyper_connections
from mhc_compile.report import CompileReport
from tests.zoo.base import Example, float_outputs

OUTPUT_TOLERANCE = 1e-5
"""Largest difference of an output, relative to its largest value."""
GRADIENT_TOLERANCE = 1e-4
"""Norm of the difference of a gradient, relative to its norm."""
NEAR_ZERO = 1e-6
"""The same relative to the largest gradient norm of the model: a key's bias has a gradient that is zero but for
rounding."""
STEPS = 4
"""Most steps until every new parameter must have had a gradient that is not zero (two do, unless the gradient of the
plain model all but vanishes at its start)."""
SHAKEN = 8.0
"""How many times the plain model's own answer to rounding is allowed, where it is asked for."""


@dataclass
class Step:
    """Differentiable outputs (detached), the loss and the gradients by parameter name of one forward and backward."""

    outputs: list[Tensor]
    loss: Tensor
    gradients: dict[str, Tensor | None]


def step(example: Example, call: Callable[..., Any] | None = None) -> Step:
    """Forward and backward of ``call`` (by default the model itself), gradients cleared before."""
    example.model.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # some models draw: masks of patches, codes of a quantizer
    output = (example.model if call is None else call)(**example.inputs)
    outputs = [value.detach().clone() for value in float_outputs(output)]
    loss = example.loss(output)
    loss.backward()
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in example.model.named_parameters()}
    return Step(outputs, loss.detach(), gradients)


def differences(plain: Step, converted: Step, shaken: Step | None = None) -> list[str]:
    """In words, what differs by more than rounding; empty if the two are equal.

    ``shaken`` is what the plain model makes of rounding (see ``shake``): what it does itself is no fault of a rewrite.
    """
    found = []
    if len(plain.outputs) != len(converted.outputs):
        found.append(f"{len(converted.outputs)} outputs, not {len(plain.outputs)}")
    for index, (want, have) in enumerate(zip(plain.outputs, converted.outputs, strict=False)):
        if want.shape != have.shape or want.dtype != have.dtype:
            found.append(f"output {index} is {have.dtype}{list(have.shape)}, not {want.dtype}{list(want.shape)}")
            continue
        usable = want.abs() < 1e8  # masked logits are -inf or the lowest float
        largest = torch.where(usable, want.abs(), 0.0).max()
        error = torch.where(usable, (have - want).abs(), 0.0).max()
        allowed = OUTPUT_TOLERANCE * largest
        if shaken is not None:
            allowed = allowed + SHAKEN * torch.where(usable, (shaken.outputs[index] - want).abs(), 0.0).max()
        if not error <= allowed:
            found.append(f"output {index} differs by {error:.2e} of {largest:.2e}")
    norms = [g.float().norm() for g in plain.gradients.values() if g is not None]
    whole = max(norms, default=torch.zeros(()))
    for name, want in plain.gradients.items():
        have = converted.gradients.get(name)
        if want is None:
            if have is not None and have.any():
                found.append(f"{name} has a gradient, and none in the plain model")
            continue
        error = (want if have is None else have - want).float().norm()
        allowed = GRADIENT_TOLERANCE * want.float().norm() + NEAR_ZERO * whole
        if shaken is not None and (other := shaken.gradients[name]) is not None:
            allowed = allowed + SHAKEN * (other - want).float().norm()
        if not error <= allowed:
            found.append(f"gradient of {name} differs by {error:.2e} of {want.float().norm():.2e}")
    return found


def shake(example: Example) -> Step:
    """A step of the plain model with every parameter rounded differently (by about one unit in the last place).

    Norms over a tiny batch and steep gates amplify rounding. The model is not to be used afterwards.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in example.model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.mul_(1 + noise * torch.finfo(parameter.dtype).eps)
    return step(example)


@dataclass
class Outcome:
    """One model through the backend. problems: in words, empty if all is well."""

    reports: list[CompileReport]
    problems: list[str]

    @property
    def sites(self) -> int:
        """Number of sites widened, over all graphs."""
        return sum(len(report.sites) for report in self.reports)

    @property
    def reasons(self) -> list[str]:
        """Why adds were left alone, each reason once."""
        return list(dict.fromkeys(r.reason for report in self.reports for r in report.left_alone))


def check(example: Example, options: Mapping[str, object], shaken: Step | None = None) -> Outcome:
    """Plain and converted step 0, then two steps of AdamW or more (see ``STEPS``); MhcError as the backend raises it.

    The optimizer exists before the first call, so that it has to adopt the new parameters.
    """
    plain = step(example)
    optimizer = torch.optim.AdamW(example.model.parameters(), lr=1e-3)
    reports.clear()
    compiled = torch.compile(example.model, backend="mhc", options=dict(options))
    first = step(example, compiled)
    outcome = Outcome(list(reports), differences(plain, first, shaken))
    still = {row.parameters for report in outcome.reports for row in report.sites if not row.gradient}
    outcome.problems += unmoved(example.model, first, still, exactly_zero=True)
    for _ in range(STEPS - 1):
        optimizer.step()
        second = step(example, compiled)
        zero = unmoved(example.model, second, still, exactly_zero=False)
        if not zero:
            break
    outcome.problems += zero
    optimizer.step()
    for row in (row for report in outcome.reports for row in report.sites):
        if not row.where or not row.parameters.startswith(row.module):
            outcome.problems.append(f"site {row.chain}.{row.index} has no place: {row}")
    if not torch.isfinite(second.loss) or second.loss == first.loss:
        outcome.problems.append(f"loss {first.loss.item()} and then {second.loss.item()}")
    for name, parameter in example.model.named_parameters():
        if not torch.isfinite(parameter).all():
            outcome.problems.append(f"{name} is not finite after two steps")
    return outcome


def unmoved(model: nn.Module, done: Step, still: set[str], *, exactly_zero: bool) -> list[str]:
    """New parameters without a gradient, or with one that is not finite or (unless allowed) zero.

    At the first step phi is zero, so the scales alpha have none; the rows of H_res are normalised over streams that are
    still equal at the head of a chain, so that its scale there never has more than rounding. ``still`` are the places
    that the report says to run under ``no_grad``.
    """
    found = []
    for place, module in hyper_connections(model):
        if any(f".{place}".endswith(f".{name}") for name in still):
            continue
        for name, _ in module.named_parameters():
            gradient = done.gradients[f"{place}.{name}"]
            if gradient is None:
                found.append(f"{place}.{name} has no gradient")
            elif not torch.isfinite(gradient).all():
                found.append(f"the gradient of {place}.{name} is not finite")
            elif not gradient.any() and not name.startswith("alpha") and exactly_zero:
                found.append(f"the gradient of {place}.{name} is zero")
            elif not gradient.any() and not exactly_zero and not (name == "alpha_res" and module.position == 0):
                found.append(f"the gradient of {place}.{name} is zero at the second step")
    return found
