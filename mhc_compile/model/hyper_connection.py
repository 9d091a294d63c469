"""The parameters of one site, and how they start.

Source: mHC (arXiv 2512.24880) eq. 14-19 for the parameters; the function-preserving start is 1-math's: equal streams
stay equal, so the converted model computes what the plain one does, but each site prefers another stream (as in
Hyper-Connections, arXiv 2409.19606), so that the streams get different gradients and part.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile import ops
from mhc_compile.errors import CheckpointError

PREFERRED = 0.7
"""Weight of the preferred stream in H_pre at the start; the others share the rest."""
DIAGONAL = 4.0
"""Logit of the diagonal of H_res at the start: the mix is near the identity (0.95 for n = 4), so that streams keep what
they have learned, and far enough from it that the logits get a gradient."""
ALPHA = 0.01
"""Start of the scales alpha (paper, section 4). With phi = 0 it is what lets phi learn."""
PHI_STD = 0.02
"""Standard deviation of phi for ``init="paper"``."""

_FORMAT = 1


class HyperConnection(nn.Module):
    """Parameters of a site, fp32 whatever the model's dtype (``.to(dtype)`` moves the device only).

    Shapes, with n streams of C channels and K = n + n + n² rows (fewer when the variant has fewer parts):
        phi: [K, n·C], the projection in ``nn.Linear`` layout (the paper's φ transposed)
        bias: [K]
        alpha_pre, alpha_post, alpha_res: [1] (FSDP2 shards no 0-dim tensor); absent for parts that the variant lacks
        settings: uint8 buffer, the attributes below as JSON, so that a checkpoint says what it was trained with

    Args:
        spec: what the coefficients are.
        width: C.
        position: index of the site in its chain; the preferred stream is ``position mod n``.
        init: ``preserve`` or ``paper``.
        device: of the parameters (``meta`` allowed; then call ``reset_parameters`` after ``to_empty``).
        variant, collapse: the options of the rewrite around it. Other ones would compute something else with the same
            parameters, so they are kept with them.
    """

    phi: nn.Parameter
    bias: nn.Parameter
    settings: Tensor

    def __init__(
        self, spec: ops.CoefficientSpec, width: int, position: int, init: str,
        device: torch.device | str | None = None, *, variant: str = "mhc", collapse: str = "mean",
    ) -> None:  # fmt: skip
        super().__init__()
        self.variant, self.collapse = variant, collapse
        self.spec, self.width, self.position, self.init = spec, width, position, init
        options: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.phi = nn.Parameter(torch.empty(spec.rows, spec.streams * width, **options))
        self.bias = nn.Parameter(torch.empty(spec.rows, **options))
        for part in spec.parts:
            self.register_parameter(f"alpha_{part}", nn.Parameter(torch.empty(1, **options)))
        self.register_buffer("settings", self._encode(device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the parameters to the start that ``init`` names."""
        if self.phi.is_meta:
            return
        if self.init == "paper":
            generator = torch.Generator().manual_seed(torch.initial_seed() % 2**31 + self.position)
            self.phi.copy_(torch.randn(self.phi.shape, generator=generator).mul_(PHI_STD))
        else:
            self.phi.zero_()
        for part in self.spec.parts:
            self.get_parameter(f"alpha_{part}").fill_(ALPHA)
        self.bias.copy_(torch.cat([self._start(part).flatten() for part in self.spec.parts]))

    def _start(self, part: str) -> Tensor:
        n, gated = self.spec.streams, self.spec.gate == "sigmoid"
        if part == "res":
            logits = torch.eye(n, dtype=torch.float64)
            return (logits * DIAGONAL if self.spec.res == "sinkhorn" else logits).float()
        if part == "post":
            return torch.zeros(n) if gated else torch.ones(n)  # 2·sigmoid(0) = 1
        if self.spec.parts == ("pre",):  # a head: all streams alike
            weights = torch.full((n,), 1 / n, dtype=torch.float64)
        else:
            weights = torch.full((n,), (1 - PREFERRED) / max(n - 1, 1), dtype=torch.float64)
            weights[self.position % n] = PREFERRED
        return (weights.log() - (1 - weights).log()).float() if gated else weights.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HyperConnection:
        """``.to()``, ``.half()``, ``.cuda()``: follow the device, keep fp32 (the coefficients need it)."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else fn_device(tensor, moved)

        def fn_device(tensor: Tensor, moved: Tensor) -> Tensor:
            return tensor.to(device=moved.device)

        super()._apply(keep_dtype, recurse)
        # to_empty() leaves garbage in buffers; the attributes are the truth
        self._buffers["settings"] = self._encode(self.phi.device)
        return self

    def _encode(self, device: torch.device | str | None) -> Tensor:
        spec = {k: str(v) if isinstance(v, torch.dtype) else v for k, v in self.spec.op_arguments().items()}
        own = {key: getattr(self, key) for key in ("width", "position", "init", "variant", "collapse")}
        text = json.dumps({"format": _FORMAT, **own, "spec": spec})
        if str(device) == "meta":
            return torch.empty(len(text.encode()), dtype=torch.uint8, device="meta")
        return torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The attributes are saved, not the buffer: an average over buffers (EMA) turns its bytes into nonsense."""
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]  # torch's own
        destination[f"{prefix}settings"] = self._encode(self.settings.device)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Refuse parameters that were trained with other coefficients; how they started is taken over."""
        key = f"{prefix}settings"
        saved = state_dict.get(key)
        if isinstance(saved, Tensor) and not saved.is_meta:
            try:
                other = HyperConnection.from_settings(saved, "meta")
            except CheckpointError as error:
                error_msgs.append(error.what)
            else:
                problem = self.disagreement(other.describe())
                if problem:
                    error_msgs.append(f"{prefix[:-1]} of the model was made with {problem} of the checkpoint")
                else:
                    self.position, self.init = other.position, other.init
            self._buffers["settings"] = self._encode(self.settings.device)
            state_dict[key] = self._encode(saved.device)  # torch passes a copy; the lengths of two starts may differ
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @classmethod
    def from_settings(cls, settings: Tensor, device: torch.device | str | None = None) -> HyperConnection:
        """The module that a checkpoint's ``settings`` describe, with its own start as values.

        Raises:
            CheckpointError: the bytes are no settings of ours, or of a newer format.
        """
        try:
            data = json.loads(bytes(settings.cpu().tolist()).decode())
            arguments = dict(data["spec"])
            if arguments.get("mix_dtype") not in (None, "None"):
                arguments["mix_dtype"] = getattr(torch, str(arguments["mix_dtype"]).removeprefix("torch."))
            else:
                arguments["mix_dtype"] = None
            spec = ops.CoefficientSpec.from_op_arguments(arguments)
            if data["format"] > _FORMAT:
                raise CheckpointError(
                    f"the checkpoint's hyper-connections have format {data['format']}, this version reads {_FORMAT}",
                    cure="install a newer mhc-compile",
                )
            around = {key: str(data[key]) for key in ("variant", "collapse")}
            return cls(spec, int(data["width"]), int(data["position"]), str(data["init"]), device, **around)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"a `settings` tensor of the checkpoint cannot be read: {error}") from error

    def describe(self) -> dict[str, Any]:
        """What must agree for the parameters to be usable: attributes that change the numbers or the shapes."""
        around = {"variant": self.variant, "collapse": self.collapse, "width": self.width}
        return around | dataclasses.asdict(self.spec)

    def disagreement(self, wanted: dict[str, Any]) -> str:
        """``key=mine, not theirs`` for the first attribute that differs from another one's ``describe()``, or empty."""
        have = self.describe()
        return next((f"{k}={have.get(k)!r}, not the {v!r}" for k, v in wanted.items() if have.get(k) != v), "")

    def coefficients(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """H_pre [..., n], H_post [..., n], H_res [..., n, n] (fp32) of streams [..., n, C]; size 0 for absent parts."""
        pre, post, res, *_ = ops.coefficients(
            streams,
            self.phi,
            self.bias,
            self.alpha_pre,
            getattr(self, "alpha_post", None),
            getattr(self, "alpha_res", None),
            **self.spec.op_arguments(),
        )
        return pre, post, res

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"streams={self.spec.streams}, width={self.width}, layout={self.spec.layout!r}, position={self.position}"

    def bytes(self) -> int:
        """Bytes of the parameters."""
        return sum(math.prod(p.shape) * p.element_size() for p in self.parameters())


def registration_order(name: str) -> tuple[int, str]:
    """Sort key of ``mhc0``, ``mhc1``, ..., ``mhc10``, ``mhc_head``: the order of the sites. A conversion and a
    checkpoint register them alike, so that optimizer states, which go by position, fit."""
    digits = name.rstrip("0123456789")
    return (int(name[len(digits) :]), digits) if name != digits else (sys.maxsize, name)


def hyper_connections(model: nn.Module) -> Iterator[tuple[str, HyperConnection]]:
    """Qualified names and modules of the hyper-connections that a model holds."""
    for name, module in model.named_modules():
        if isinstance(module, HyperConnection):
            yield name, module
