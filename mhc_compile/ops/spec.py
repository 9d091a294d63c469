"""Attributes of the semantic ops, as frozen, validated, hashable data.

A recognised chain keeps its own semantics to the last eps: what distinguishes two spellings is an attribute here,
never a different code path that looks alike. Sources: mHC (arXiv 2512.24880) equations 14-19, Hyper-Connections
(arXiv 2409.19606), the DeepSeek-V4 report (arXiv 2606.19348) and Hugging Face's `modeling_deepseek_v4.py`.

Custom-op schemas take only int, float, bool, str and dtype, so each spec also spells itself as flat keyword arguments
(`op_arguments`) and can be rebuilt from them (`from_op_arguments`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

Positivity = Literal["softmax", "exp", "exp_rowmax", "log", "abs"]
Axis = Literal["row", "column"]
EpsMode = Literal["add", "clamp"]
Norm = Literal["rms", "rms_outside", "none"]
Gate = Literal["sigmoid", "linear"]
Residual = Literal["sinkhorn", "linear", "none"]
CollapseKind = Literal["mean", "sum"]

PARTS = ("pre", "post", "res")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _one_of(name: str, value: object, allowed: object) -> None:
    choices = get_args(allowed)
    _require(value in choices, f"{name} must be one of {choices}, got {value!r}")


@dataclass(frozen=True)
class SinkhornSpec:
    """How logits `[..., n, n]` become a (nearly) doubly stochastic matrix.

    positivity    softmax: softmax over dim -1; exp; exp_rowmax: exp(x - max over dim -1), with the gradient of the
    maximum;
                  log: the steps subtract a logsumexp and one exp ends them; abs: |x|.
    positive_eps  added to the positive matrix (0 for `log`).
    first, steps  number of HALF steps (one division by the sums along one axis), alternating, the first along `first`:
                  "row" normalises over dim -1, "column" over dim -2.
    eps, eps_mode the divisor is sum + eps ("add") or max(sum, eps) ("clamp"); 0 for `log`.
    """

    positivity: Positivity = "softmax"
    positive_eps: float = 1e-6
    first: Axis = "column"
    steps: int = 40
    eps: float = 0.0
    eps_mode: EpsMode = "add"

    def __post_init__(self) -> None:
        _one_of("positivity", self.positivity, Positivity)
        _one_of("first", self.first, Axis)
        _one_of("eps_mode", self.eps_mode, EpsMode)
        _require(self.steps >= 0, f"steps must be >= 0, got {self.steps}")
        _require(self.eps >= 0.0 and self.positive_eps >= 0.0, "eps and positive_eps must be >= 0")
        if self.positivity == "log":
            _require(self.eps == 0.0 and self.positive_eps == 0.0, "positivity 'log' has no place for an eps")

    @property
    def last(self) -> Axis | None:
        """The axis that is normalised last, hence the one whose sums are 1; None without steps."""
        if self.steps == 0:
            return None
        other: Axis = "row" if self.first == "column" else "column"
        return self.first if self.steps % 2 == 1 else other

    def op_arguments(self) -> dict[str, object]:
        """The keyword arguments of `mhc::sinkhorn`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_op_arguments(cls, arguments: Mapping[str, object]) -> SinkhornSpec:
        """Inverse of `op_arguments`; other keys are ignored."""
        own: dict[str, Any] = {field.name: arguments[field.name] for field in dataclasses.fields(cls)}
        return cls(**own)


NO_SINKHORN = SinkhornSpec(positivity="softmax", positive_eps=0.0, first="column", steps=0)
"""What the flat arguments carry where a layout has no Sinkhorn."""


@dataclass(frozen=True)
class CoefficientSpec:
    """How the mixing coefficients of a site follow from the streams.

    layout     order of the rows of phi, a comma-separated subset of pre, post, res, each once.
    streams    n; pre and post have n rows, res has n*n, reshaped row-major to [n, n].
    norm       rms: r = sqrt(mean(x^2) + norm_eps); rms_outside: r = |x| / sqrt(nC) + norm_eps; none: r = 1.
    gate       activation of pre and post: sigmoid or linear. pre = pre_scale * act(p) + pre_eps, post likewise.
    res        sinkhorn, linear (the logits themselves), or none (the layout has no res rows).
    mix_dtype  dtype that post and res are returned in (Hugging Face casts them to bf16); None keeps the compute dtype.
    """

    layout: str = "pre,post,res"
    streams: int = 4
    norm: Norm = "rms"
    norm_eps: float = 1e-6
    gate: Gate = "sigmoid"
    pre_scale: float = 1.0
    pre_eps: float = 0.0
    post_scale: float = 2.0
    post_eps: float = 0.0
    res: Residual = "sinkhorn"
    sinkhorn: SinkhornSpec | None = SinkhornSpec()
    mix_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        parts = self.parts
        _require(len(parts) > 0 and len(set(parts)) == len(parts), f"layout {self.layout!r} is empty or repeats a part")
        _require(all(part in PARTS for part in parts), f"layout {self.layout!r} may only name {PARTS}")
        _require(self.streams >= 1, f"streams must be >= 1, got {self.streams}")
        _one_of("norm", self.norm, Norm)
        _one_of("gate", self.gate, Gate)
        _one_of("res", self.res, Residual)
        _require(("res" in parts) == (self.res != "none"), f"layout {self.layout!r} does not fit res={self.res!r}")
        _require(
            (self.sinkhorn is not None) == (self.res == "sinkhorn"),
            "a SinkhornSpec is needed for res='sinkhorn', and only there",
        )
        _require(self.mix_dtype is None or self.mix_dtype.is_floating_point, "mix_dtype must be a floating dtype")

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts in the order of phi's rows."""
        return tuple(part.strip() for part in self.layout.split(",") if part.strip())

    def part_size(self, part: str) -> int:
        """Rows of phi that `part` takes; 0 when it is absent."""
        if part not in self.parts:
            return 0
        return self.streams**2 if part == "res" else self.streams

    @property
    def rows(self) -> int:
        """K, the number of rows of phi and of elements of the bias."""
        return sum(self.part_size(part) for part in self.parts)

    def offset(self, part: str) -> int:
        """First row of `part` in phi; KeyError where the layout lacks it."""
        start = 0
        for name in self.parts:
            if name == part:
                return start
            start += self.part_size(name)
        raise KeyError(part)

    def op_arguments(self) -> dict[str, object]:
        """The keyword arguments of `mhc::coefficients`, Sinkhorn's under the prefix `sinkhorn_`."""
        flat: dict[str, object] = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "sinkhorn"
        }
        inner = self.sinkhorn if self.sinkhorn is not None else NO_SINKHORN
        flat.update({f"sinkhorn_{name}": value for name, value in inner.op_arguments().items()})
        return flat

    @classmethod
    def from_op_arguments(cls, arguments: Mapping[str, object]) -> CoefficientSpec:
        """Inverse of `op_arguments`; other keys are ignored."""
        own: dict[str, Any] = {
            field.name: arguments[field.name] for field in dataclasses.fields(cls) if field.name != "sinkhorn"
        }
        inner: SinkhornSpec | None = None
        if own["res"] == "sinkhorn":
            prefix = "sinkhorn_"
            inner = SinkhornSpec.from_op_arguments(
                {name[len(prefix) :]: value for name, value in arguments.items() if name.startswith(prefix)}
            )
        return cls(sinkhorn=inner, **own)
