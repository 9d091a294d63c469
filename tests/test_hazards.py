"""One regression test for each hazard of torch that decided the design (the note on torch's facts, section 0)."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mhc_compile
from mhc_compile import ops
from mhc_compile.backend import reports
from mhc_compile.config import Options
from mhc_compile.errors import UncompiledError, WrappedModelError
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.lowering.inductor import config_patches
from mhc_compile.model import hyper_connections
from tests.tiny import EAGER, Block, compiled, ids, loss_of, tiny, train

ROOT = Path(__file__).parent.parent


def test_hazard_1_code_is_not_shared_between_instances() -> None:
    """Dynamo re-uses code by class: each instance must be converted, and run with its own parameters."""
    first = tiny(0, layers=1)
    options = {**EAGER}
    call = torch.compile(first, backend="mhc", options=options)
    train(call, torch.optim.SGD(first.parameters(), lr=0.5), 2)
    plain = tiny(1, layers=1)
    twin = copy.deepcopy(first)
    for model in (plain, twin):
        torch.compile(model, backend="mhc", options=options)(ids())
        assert len(list(hyper_connections(model))) == 2
    with torch.no_grad():
        for parameter in twin.layers[0].mhc0.parameters():
            parameter.add_(1.0)
    assert not torch.equal(torch.compile(twin, backend="mhc", options=options)(ids()), call(ids()))
    many = [tiny(seed, layers=1) for seed in range(2, 12)]  # more than Dynamo's limit of recompilations
    for model in many:
        torch.compile(model, backend="mhc", options=options)(ids())
    assert all(any(hyper_connections(model)) for model in many)


@pytest.mark.parametrize(
    "way", ["plain call", "method of the wrapper", "stance", "suppress_errors", "limit", "export", "disable"]
)
def test_hazard_2_eager_is_never_silent(way: str) -> None:
    model = tiny(layers=1)
    call = compiled(model)
    call(ids())

    def fail(gm: Any, inputs: Any) -> Any:
        raise RuntimeError("no")

    with pytest.raises(UncompiledError, match="hyper-connections"):  # noqa: PT012 - the ways are what differs
        if way == "plain call":
            model(ids())
        elif way == "method of the wrapper":
            call.forward.__wrapped__(ids()) if hasattr(call.forward, "__wrapped__") else model.forward(ids())
        elif way == "stance":
            with torch.compiler.set_stance("force_eager"):
                call(ids())
        elif way == "suppress_errors":
            with torch._dynamo.config.patch(suppress_errors=True):
                torch.compile(model, backend=fail)(ids())
        elif way == "limit":
            with torch._dynamo.config.patch(recompile_limit=1, automatic_dynamic_shapes=False):
                call(ids(3, 7))
        elif way == "export":
            torch.export.export(call, (ids(),), strict=False)
        else:
            torch.compiler.disable(model)(ids())


def test_hazard_2_a_failed_conversion_is_not_suppressed() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with torch._dynamo.config.patch(suppress_errors=True), pytest.raises(mhc_compile.errors.NoSiteError):
        compiled(model)(torch.randn(2, 4))


def test_hazard_3_keys_of_inductors_caches() -> None:
    """What inductor cannot see in the graph is in the key of our pass: every option, and the package's source."""

    def key(**options: Any) -> Any:
        return config_patches(Options(**options), LoweringLog())["post_grad_custom_pre_pass"].uuid()

    assert key() == key()
    others = [{"recompute": "memory"}, {"lowering": "native"}, {"fuse": False}, {"recompute": 10**9}]
    keys = [repr(key(**options)) for options in ({}, *others)]
    assert len(set(keys)) == len(keys)
    assert len(pickle.dumps(key())) > 0


@pytest.mark.slow
def test_hazard_3_two_conversions_share_no_artefact() -> None:
    """The same model, other options, caches on: outputs are those of the options, whatever was compiled before."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16)

    def output(compiler: str, **options: Any) -> Tensor:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(Block(), nn.LayerNorm(16))
        mhc_compile.prepare(model, x, init="paper", **options)
        for _, hc in hyper_connections(model):
            with torch.no_grad():
                hc.bias.copy_(torch.linspace(-1, 1, hc.bias.numel()))
        with torch.no_grad():
            return compiled(model, compiler=compiler, init="paper", **options)(x)

    for options in ({}, {"sinkhorn_iters": 1}, {"variant": "single_pass"}, {"lowering": "native"}, {}):
        assert torch.allclose(output("inductor", **options), output("eager", **options), rtol=1e-4, atol=1e-5)


def test_hazard_4_dynamos_own_graph_is_not_touched() -> None:
    """Dynamo reads its placeholders again after the backend has returned."""
    seen = []

    def backend(gm: Any, inputs: Any, **kwargs: Any) -> Any:
        from mhc_compile.backend import mhc

        before = [(n.name, n.op, str(n.target), tuple(map(str, n.args)), sorted(n.meta)) for n in gm.graph.nodes]
        result = mhc(gm, inputs, options=EAGER)
        after = [(n.name, n.op, str(n.target), tuple(map(str, n.args)), sorted(n.meta)) for n in gm.graph.nodes]
        seen.append(before == after)
        assert all("grapharg" in n.meta for n in gm.graph.find_nodes(op="placeholder"))
        return result

    model = tiny(layers=1)
    want = model(ids())
    assert torch.allclose(torch.compile(model, backend=backend)(ids()), want, rtol=1e-5, atol=1e-6)
    assert seen == [True]


@pytest.mark.parametrize("late", [False, True], ids=["adopted at the conversion", "adopted before the step"])
def test_hazard_5_gradient_scaler(late: bool) -> None:
    """An adopted parameter's gradient must be unscaled like the others': the first update was 160, not 0.002."""
    model = tiny(layers=1)
    old = list(model.parameters())
    optimizer = torch.optim.SGD(old, lr=0.1)
    call = compiled(model)
    if late:
        call(ids())
        optimizer = torch.optim.SGD(old, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    start: dict[str, Tensor] = {}
    for _ in range(2):
        optimizer.zero_grad()
        loss = loss_of(call(ids()))
        start = start or {name: p.detach().clone() for name, p in model.named_parameters()}
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = {name: float((p.detach() - start[name]).abs().max()) for name, p in model.named_parameters()}
        assert max(moved.values()) < 0.1
    assert all(value > 0 for name, value in moved.items() if name.endswith("phi"))


@pytest.mark.parametrize(("family", "cases"), [("ddp", 5), ("fsdp", 3)])
def test_hazard_6_wrapped_models(family: str, cases: int, tmp_path: Path) -> None:
    """Two processes over gloo; see tests/distributed/workers.py for what each case does."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.workers", family, str(tmp_path / "store")]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.count(": passed") == 2 * cases


def test_hazard_6_prepare_of_a_wrapped_model(tmp_path: Path) -> None:
    """Not even prepare() may add parameters below a DDP that knows nothing of them."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(tiny(layers=1))
        for target in (model, compiled(model)):
            with pytest.raises(WrappedModelError, match="DistributedDataParallel"):
                mhc_compile.prepare(target, ids())
        assert not any(hyper_connections(model))
    finally:
        dist.destroy_process_group()


def test_hazard_7_checkpoints_that_lost_their_parameters(tmp_path: Path) -> None:
    """The whole way through Hugging Face's files is in tests/model/test_marker.py; here the rule itself."""
    model = tiny(layers=1)

    class Config:
        mhc: Any = None

        def to_json_string(self) -> str:
            return ""

    model.config = Config()
    model.config.mhc = {"streams": 4}  # as JSON gives it back
    with pytest.raises(mhc_compile.errors.CheckpointError, match="from_pretrained dropped them"):
        compiled(model)(ids())
    assert not any(hyper_connections(model))


class Regions(nn.Module):
    """The first reader of the stream stands in a region that changes what is computed in it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed, self.block, self.norm = nn.Embedding(19, 16), Block(), nn.LayerNorm(16)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def region(self) -> Any:
        return torch.no_grad() if self.kind == "no_grad" else torch.autocast("cpu", torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.embed(x))
        with self.region():
            scale = self.first(x).mean()
        x = x + self.second(self.norm(x)) * scale.float()
        return self.norm(x)


@pytest.mark.parametrize("kind", ["no_grad", "autocast"])
def test_hazard_8_regions_of_the_first_reader(kind: str) -> None:
    """What is inserted before the first reader lands inside the reader's region and loses gradients or bits."""
    torch.manual_seed(0)
    plain = Regions(kind)
    model = copy.deepcopy(plain)
    want, got = plain(ids()), compiled(model)(ids())
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    loss_of(want).backward()
    loss_of(got).backward()
    for name, parameter in plain.named_parameters():
        other = model.get_parameter(name)
        if parameter.grad is None:
            assert other.grad is None, name
        else:
            assert torch.allclose(other.grad, parameter.grad, rtol=1e-3, atol=1e-6), name
    assert all(p.grad is not None for _, hc in hyper_connections(model) for p in hc.parameters())


class Doubled(torch.autograd.Function):
    """Identity forward, twice the gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.mix, self.norm = Block(), nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        y = self.mix(self.norm(x))
        y.register_hook(lambda grad: grad * 3)
        return self.norm(x + Doubled.apply(y))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_hazard_9_hooks_and_custom_functions_survive(compiler: str) -> None:
    """Gradients are those of the plain model, the factor 6 of the hook and of the function among them."""
    torch.manual_seed(0)
    plain = Hooked()
    model = copy.deepcopy(plain)
    x = torch.randn(2, 3, 16)
    call = compiled(model, compiler=compiler)
    for target, function in ((plain, plain), (model, call)):
        loss_of(function(x)).backward()
        assert target.mix.weight.grad is not None
    for name, parameter in plain.named_parameters():
        assert torch.allclose(model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-7), name


def test_hazard_10_nothing_runs_on_another_stream_unless_asked() -> None:
    """Side streams race with inductor's re-use of buffers: no operation of ours is asynchronous and no graph of ours
    waits or forks, but for what the scheduler puts there on a calibrated GPU (tests/scheduler/test_emit.py)."""
    assert not [name for name in ops.OPS if "async" in name or "join" in name or "wait" in name]
    model = tiny(layers=1)
    compiled(model)(ids())
    assert not any(word in reports[-1].graph for word in ("stream_", "fork", "wait_event", "record_event", "streams::"))
    patches = {value: config_patches(Options(schedule=value), LoweringLog()) for value in ("off", "auto")}
    assert patches["off"].keys() == patches["auto"].keys()


def test_messages_cross_processes() -> None:
    """An error of a worker reaches the parent with its parts."""
    buffer = io.BytesIO(pickle.dumps(WrappedModelError("late")))
    assert "prepare" in str(pickle.load(buffer).cure)
