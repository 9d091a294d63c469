"""Cases of two processes over gloo: ``python -m tests.distributed.workers <ddp or fsdp> <rendezvous file>``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import mhc_compile
from mhc_compile.errors import FragmentError, MhcError, WrappedModelError
from mhc_compile.model import hyper_connections
from tests.tiny import EAGER, Tiny, ids, loss_of

AOT = {"compiler": "aot_eager"}


def model() -> Tiny:
    torch.manual_seed(0)
    return Tiny(2)


def data(rank: int) -> torch.Tensor:
    return ids(2, 5, seed=rank + 10)


def compiled(module: nn.Module, options: dict[str, Any] = EAGER) -> Any:
    return torch.compile(module, backend="mhc", options=options)


def refused(call: Any, inner: nn.Module, rank: int, error: type[MhcError] = WrappedModelError) -> str:
    with pytest.raises(error) as info:
        call(data(rank))
    assert not any(hyper_connections(inner)), "half converted"
    return str(info.value)


def ddp_late(rank: int) -> None:
    """compile(DDP(m)): refused, one graph or not, and prepare() is named."""
    for optimize in (True, False):
        torch._dynamo.reset()
        torch._dynamo.config.optimize_ddp = optimize
        inner = model()
        assert "prepare" in refused(compiled(DistributedDataParallel(inner)), inner, rank)


def ddp_outside_late(rank: int) -> None:
    """DDP(compile(m)) and m.compile(); DDP(m)."""
    for optimize in (True, False):
        torch._dynamo.reset()
        torch._dynamo.config.optimize_ddp = optimize
        inner = model()
        assert "prepare" in refused(DistributedDataParallel(compiled(inner)), inner, rank)
        torch._dynamo.reset()
        inner = model()
        inner.compile(backend="mhc", options=EAGER)
        assert "prepare" in refused(DistributedDataParallel(inner), inner, rank)


def ddp_split_late(rank: int) -> None:
    """Buckets so small that DDP cuts the graph into many."""
    inner = model()
    message = refused(compiled(DistributedDataParallel(inner, bucket_cap_mb=0.001)), inner, rank, MhcError)
    assert "optimize_ddp" in message, message


def same_gradients(inner: nn.Module, reference: nn.Module) -> None:
    """Every gradient is the mean over the ranks, and so the same on both."""
    expected = []
    for rank in range(2):
        reference.zero_grad()
        loss_of(compiled(reference)(data(rank))).backward()
        expected.append({name: p.grad.clone() for name, p in reference.named_parameters()})
    assert any(".mhc" in name for name in expected[0])
    for name, parameter in inner.named_parameters():
        mean = (expected[0][name] + expected[1][name]) / 2
        scale = mean.abs().max().clamp_min(1e-6)  # alpha has no gradient while phi is zero
        worst = float((parameter.grad - mean).abs().max() / scale)
        alone = float((parameter.grad - expected[dist.get_rank()][name]).abs().max() / scale)
        assert worst < 1e-3, f"{name}: {worst} from the mean, {alone} from this rank's own"


def ddp_prepared(rank: int) -> None:
    """prepare(), then DDP, one graph: gradients of the new parameters are reduced like all others."""
    torch._dynamo.config.optimize_ddp = False
    for wrap in (
        lambda m: compiled(DistributedDataParallel(m), AOT),
        lambda m: DistributedDataParallel(compiled(m, AOT)),
    ):
        torch._dynamo.reset()
        inner = model()
        mhc_compile.prepare(inner, data(rank), **AOT)
        wrapped = wrap(inner)  # kept: the reducer dies with it
        loss_of(wrapped(data(rank))).backward()
        reference = model()
        mhc_compile.prepare(reference, data(rank))
        same_gradients(inner, reference)


def ddp_prepared_split(rank: int) -> None:
    """Prepared, but DDP cuts the graph: refused with the setting that cures it."""
    inner = model()
    mhc_compile.prepare(inner, data(rank))
    with pytest.raises(MhcError) as info:
        compiled(DistributedDataParallel(inner, bucket_cap_mb=0.001))(data(rank))
    assert "optimize_ddp" in str(info.value), str(info.value)


def fsdp_prepared(rank: int) -> None:
    """prepare(), then fully_shard of the root: the new parameters are sharded, and train."""
    inner = model()
    mhc_compile.prepare(inner, data(rank), **AOT)
    fully_shard(inner, mesh=init_device_mesh("cpu", (2,)))
    ours = [p for _, hc in hyper_connections(inner) for p in hc.parameters()]
    assert ours
    assert all(isinstance(p, DTensor) for p in ours)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    loss_of(compiled(inner, AOT)(data(rank))).backward()
    before = [p.full_tensor().clone() for p in ours]
    reference = model()
    mhc_compile.prepare(reference, data(rank))
    gradients = {name: p.grad.full_tensor() for name, p in inner.named_parameters()}
    optimizer.step()
    assert any(not torch.equal(p.full_tensor(), old) for p, old in zip(ours, before, strict=True))
    torch._dynamo.reset()
    for parameter, (name, _) in zip(inner.parameters(), reference.named_parameters(), strict=True):
        parameter.grad = None
        assert torch.isfinite(gradients[name]).all()
    expected = []
    for other in range(2):
        reference.zero_grad()
        loss_of(compiled(reference)(data(other))).backward()
        expected.append({name: p.grad.clone() for name, p in reference.named_parameters()})
    for name, gradient in gradients.items():
        mean = (expected[0][name] + expected[1][name]) / 2
        assert torch.allclose(gradient, mean, rtol=1e-4, atol=1e-7), name


def fsdp_late(rank: int) -> None:
    inner = model()
    fully_shard(inner, mesh=init_device_mesh("cpu", (2,)))
    message = refused(compiled(inner), inner, rank)
    assert "FSDP" in message
    assert "prepare" in message


def fsdp_per_layer(rank: int) -> None:
    """One graph for each layer: the streams would have to cross its border."""
    inner = model()
    mhc_compile.prepare(inner, data(rank))
    mesh = init_device_mesh("cpu", (2,))
    for layer in inner.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(inner, mesh=mesh)
    with pytest.raises(MhcError) as info:
        compiled(inner)(data(rank))
    assert isinstance(info.value, FragmentError), repr(info.value)


CASES: dict[str, Callable[[int], None]] = {
    "ddp late": ddp_late,
    "ddp outside late": ddp_outside_late,
    "ddp split late": ddp_split_late,
    "ddp prepared": ddp_prepared,
    "ddp prepared split": ddp_prepared_split,
    "fsdp prepared": fsdp_prepared,
    "fsdp late": fsdp_late,
    "fsdp per layer": fsdp_per_layer,
}


def worker(rank: int, cases: list[str], store: str) -> None:
    torch.set_num_threads(1)
    dist._DEFAULT_FIRST_BUCKET_BYTES = 512  # DDP's first bucket, which must not be larger than the others
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        for case in cases:
            torch._dynamo.reset()
            with torch._dynamo.config.patch(optimize_ddp=True):
                CASES[case](rank)
            print(f"{case}: passed", flush=True)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    chosen = [case for case in CASES if case.startswith(sys.argv[1])]
    mp.spawn(worker, args=(chosen, sys.argv[2]), nprocs=2)
