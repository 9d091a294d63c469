"""What holds for every op of the vocabulary: opcheck, gradcheck, autocast, odd shapes and strides, the names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mhc_compile import ops
from mhc_compile.ops import CoefficientSpec, SinkhornSpec

STREAMS = (1, 2, 3, 4, 8)
LEADING = ((3,), (2, 3), (1,), (0,), ())


def _tensor(*shape: int, dtype: torch.dtype, grad: bool) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_(grad)


def call(
    name: str, n: int, lead: tuple[int, ...], dtype: torch.dtype = torch.float64, grad: bool = True
) -> tuple[Any, ...]:
    """(op, tensor arguments, keyword arguments) of a small call."""

    def make(*shape: int) -> Tensor:
        return _tensor(*shape, dtype=dtype, grad=grad)

    width = 5
    state = make(*lead, n, width)
    if name == "expand":
        return ops.expand, (make(*lead, width),), {"streams": n}
    if name == "collapse":
        return ops.collapse, (state,), {"kind": "mean"}
    if name == "pre":
        return ops.pre, (state, make(*lead, n)), {}
    if name == "pre_norm":
        attributes = {"kind": "layer", "eps": 1e-3, "offset": 1.0, "round_first": False, "keep": True}
        return ops.pre_norm, (state, make(*lead, n), make(width), make(width)), attributes
    if name == "post":
        return ops.post, (state, make(*lead, width), make(*lead, n), make(*lead, n, n)), {"transpose": n % 2 == 0}
    if name == "sinkhorn":
        return ops.sinkhorn, (make(*lead, n, n),), SinkhornSpec(steps=5).op_arguments()
    if name == "stream_norm":
        return ops.stream_norm, (state, make(n, width)), {"offset": 1.0, "eps": 1e-3}
    if name == "channel_pre":
        return ops.channel_pre, (state, make(2, n * width), make(n * width, 2)), {"inner": 0.3, "scale": 1.0 / n}
    spec = CoefficientSpec(streams=n, sinkhorn=SinkhornSpec(steps=4))
    small = (make(spec.rows, n * width), make(spec.rows), make(), make(1), make())
    return ops.coefficients, (state, *small), spec.op_arguments()


def differentiable(op: Callable[..., Any], keywords: dict[str, object]) -> Callable[..., Any]:
    def run(*args: Tensor) -> Any:
        out = op(*args, **keywords)
        return (
            out if isinstance(out, Tensor) else tuple(value for value in out if value.requires_grad and value.numel())
        )

    return run


@pytest.mark.parametrize("n", STREAMS)
@pytest.mark.parametrize("name", list(ops.OPS))
def test_gradcheck(name: str, n: int) -> None:
    op, tensors, keywords = call(name, n, (2,))
    assert torch.autograd.gradcheck(differentiable(op, keywords), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("lead", [(2, 3), (1,), (0,)])
@pytest.mark.parametrize("name", list(ops.OPS))
def test_opcheck(name: str, lead: tuple[int, ...], dtype: torch.dtype) -> None:
    op, tensors, keywords = call(name, 4, lead, dtype)
    opcheck(op.overload, tensors, keywords)


def opcheck(overload: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """The fourth of opcheck's own tests runs with symbolic sizes; the static form is added."""
    torch.library.opcheck(overload, args, keywords)
    torch.library.opcheck(overload, args, keywords, test_utils="test_aot_dispatch_static")


class Heard(TorchDispatchMode):
    """Remembers the arguments of the last call of an overload, without autograd."""

    def __init__(self, overload: Any) -> None:
        super().__init__()
        self.overload, self.args = overload, ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.overload:
            self.args = tuple(value.detach() if isinstance(value, Tensor) else value for value in args)
        return func(*args, **(kwargs or {}))


def backward_arguments(op: Any, tensors: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, ...]:
    """What autograd calls the backward overload with."""
    with Heard(op.backward_overload) as heard:
        outs = op(*tensors, **keywords)
        outs = (outs,) if isinstance(outs, Tensor) else outs
        sum(out.sum() for out in outs if out.requires_grad).backward()
    return heard.args


@pytest.mark.parametrize(
    ("lead", "dtype"),
    [((2, 3), torch.bfloat16), ((2, 3), torch.float16), ((2, 3), torch.float32), ((0,), torch.float32)],
)
@pytest.mark.parametrize("name", list(ops.OPS))
def test_opcheck_of_the_backward(name: str, lead: tuple[int, ...], dtype: torch.dtype) -> None:
    op, tensors, keywords = call(name, 4, lead, dtype)
    opcheck(op.backward_overload, backward_arguments(op, tensors, keywords), {})


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(ops.OPS))
def test_on_a_device(name: str) -> None:
    """opcheck of both overloads and gradcheck, as on a CPU."""
    op, tensors, keywords = call(name, 4, (2, 3), torch.bfloat16)
    narrow = tuple(value.detach().cuda().requires_grad_() for value in tensors)
    opcheck(op.overload, narrow, keywords)
    opcheck(op.backward_overload, backward_arguments(op, narrow, keywords), {})
    op, tensors, keywords = call(name, 3, (2,))
    wide = tuple(value.detach().cuda().requires_grad_() for value in tensors)
    assert torch.autograd.gradcheck(differentiable(op, keywords), wide)


@pytest.mark.parametrize("lead", LEADING)
@pytest.mark.parametrize("name", list(ops.OPS))
def test_every_number_of_tokens(name: str, lead: tuple[int, ...]) -> None:
    """No tokens, one token, a single vector: shapes, gradients of the right shape, nothing NaN."""
    op, tensors, keywords = call(name, 4, lead, torch.float32)
    outs = op(*tensors, **keywords)
    outs = (outs,) if isinstance(outs, Tensor) else outs
    sum(out.sum() for out in outs if out.requires_grad).backward()
    assert all(out.shape[: len(lead)] == lead for out in outs)
    for tensor in tensors:
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
        assert torch.isfinite(tensor.grad).all()


@pytest.mark.parametrize("name", list(ops.OPS))
def test_autocast_changes_nothing(name: str) -> None:
    op, tensors, keywords = call(name, 4, (2, 3), torch.float32)

    def run() -> list[Tensor]:
        outs = op(*tensors, **keywords)
        outs = [outs] if isinstance(outs, Tensor) else list(outs)
        grads = torch.autograd.grad(sum(out.square().sum() for out in outs if out.requires_grad), tensors)
        return [*outs, *grads]

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        actual = run()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", list(ops.OPS))
def test_strides_do_not_matter_and_outputs_are_fresh(name: str) -> None:
    op, tensors, keywords = call(name, 4, (2, 3), torch.float32, grad=False)
    strided = [torch.stack((t, t), -1)[..., 0] if t.dim() else t for t in tensors]
    expected, actual = op(*tensors, **keywords), op(*strided, **keywords)
    pairs = [(actual, expected)] if isinstance(actual, Tensor) else list(zip(actual, expected, strict=True))
    pointers = {t.untyped_storage().data_ptr() for t in strided}
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        assert got.untyped_storage().data_ptr() not in pointers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["expand", "pre", "post", "collapse", "stream_norm"])
def test_low_precision_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    """Low precision in and out, float32 inside: the error is one rounding of the float64 result."""
    op, tensors, keywords = call(name, 4, (2, 3), dtype, grad=False)
    exact = op(*(t.double() for t in tensors), **keywords)
    torch.testing.assert_close(op(*tensors, **keywords), exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in ops.OPS if name != "expand"])
def test_frozen_inputs_get_no_gradient(name: str) -> None:
    op, tensors, keywords = call(name, 4, (2,), torch.float32)
    for tensor in tensors[1:]:
        tensor.requires_grad_(False)
    outs = op(*tensors, **keywords)
    out = outs if isinstance(outs, Tensor) else outs[2 if name == "coefficients" else 0]
    out.sum().backward()
    assert tensors[0].grad is not None
    assert all(t.grad is None for t in tensors[1:])


def test_non_floating_input_is_refused() -> None:
    with pytest.raises(TypeError, match="floating"):
        ops.pre(torch.ones(2, 4, 3, dtype=torch.int64), torch.ones(2, 4))


def test_vocabulary_is_registered() -> None:
    for name, op in ops.OPS.items():
        assert op.overload is getattr(torch.ops.mhc, name).default
        assert op.backward_overload is getattr(torch.ops.mhc, f"{name}_backward").default
