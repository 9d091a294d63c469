from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from mhc_compile import cost, ops
from mhc_compile.cost import CPU, Device, Work

WIDE = Device("wide", bandwidth=1e12, flops={"bfloat16": 1e15, "float32": 1e13}, latency=1e-6)


def node(target, *args, **kwargs) -> fx.Node:
    """A node that calls `target` on placeholders of the given tensors, with fake values."""
    graph = fx.Graph()
    with FakeTensorMode() as mode:
        nodes, fakes = [], []
        for index, value in enumerate(args):
            if isinstance(value, torch.Tensor):
                fakes.append(mode.from_tensor(value))
                nodes.append(graph.placeholder(f"x{index}"))
                nodes[-1].meta["example_value"] = fakes[-1]
            else:
                fakes.append(value)
                nodes.append(value)
        call = graph.call_function(target, tuple(nodes), kwargs)
        call.meta["example_value"] = target(*fakes, **kwargs)
    return call


def test_traffic_of_our_ops_is_the_least_there_is() -> None:
    tokens, n, width = 3, 4, 16
    state = torch.zeros(tokens, n, width, dtype=torch.bfloat16)
    y, gate, res = state[:, 0], torch.zeros(tokens, n), torch.zeros(tokens, n, n)
    unit, small = tokens * width * 2, tokens * n * 4
    pre = cost.work(node(ops.pre.overload, state, gate))
    assert (pre.read, pre.written) == (n * unit + small, unit)
    post = cost.work(node(ops.post.overload, state, y, gate, res))
    assert (post.read, post.written) == (n * unit + unit + small + n * small, n * unit)
    expand = cost.work(node(ops.expand.overload, y, n))
    assert (expand.read, expand.written) == (unit, n * unit)


def test_flops() -> None:
    a, b = torch.zeros(2, 3, 5), torch.zeros(5, 7)
    assert cost.work(node(torch.matmul, a, b)).flops == 2 * 2 * 3 * 5 * 7
    assert cost.work(node(torch.nn.functional.linear, a, b.t().contiguous())).flops == 2 * 2 * 3 * 5 * 7
    q = torch.zeros(1, 2, 8, 4)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert cost.work(node(attention, q, q, q)).flops == 4 * 2 * 8 * 8 * 4
    assert cost.work(node(attention, q, q, q, is_causal=True)).flops == 2 * 2 * 8 * 8 * 4
    image, kernel = torch.zeros(1, 3, 8, 8), torch.zeros(6, 3, 3, 3)
    assert cost.work(node(torch.nn.functional.conv2d, image, kernel)).flops == 2 * (6 * 6 * 6) * 27
    assert cost.work(node(torch.add, a, a)).flops == 30


def test_views_cost_nothing() -> None:
    call = node(torch.transpose, torch.zeros(2, 3), 0, 1)
    assert cost.work(call) == Work()
    assert cost.seconds(call, CPU) == 0.0


def test_seconds_is_the_larger_of_memory_and_arithmetic() -> None:
    assert Work(500_000, 500_000, 1).seconds(WIDE) == pytest.approx(2e-6)
    assert Work(1, 1, 10**9).seconds(WIDE) == pytest.approx(1e-6 + 1e-4)
    assert Work(1, 1, 10**9, "bfloat16").seconds(WIDE) == pytest.approx(2e-6)
    assert Work(1, 1, 10**9, "float16").seconds(WIDE) == pytest.approx(2e-6)


def test_open_sizes_count_as_their_hint() -> None:
    sizes: list[int] = []

    def keep(gm, inputs):
        add = next(n for n in gm.graph.nodes if n.op == "call_function" and cost.target_name(n) == "add")
        sizes.append(cost.bytes_of(add))
        return gm.forward

    torch.compile(lambda x: x + 1, backend=keep, dynamic=True)(torch.zeros(6, 5))
    assert sizes == [6 * 5 * 4]


def test_numbers_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHC_COMPILE_CACHE_DIR", str(tmp_path / "deep"))
    assert cost.load(WIDE.name) is None
    cost.save(WIDE)
    assert cost.load(WIDE.name) == WIDE
    assert len(list((tmp_path / "deep").iterdir())) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "wide"}'])
def test_a_file_that_cannot_be_used_is_measured_again(text: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MHC_COMPILE_CACHE_DIR", str(tmp_path))
    cost.save(WIDE)
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    assert cost.load(WIDE.name) is None
    broken = json.dumps({"name": "wide", "bandwidth": 0.0, "flops": {"float32": 1.0}, "latency": 1.0, "measured": True})
    path.write_text(broken)
    assert cost.load(WIDE.name) is None


def test_a_directory_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("MHC_COMPILE_CACHE_DIR", str(file))
    cost.save(WIDE)
    assert cost.load(WIDE.name) is None


def test_cpu_has_nominal_numbers() -> None:
    device = cost.device_of("cpu")
    assert device is CPU
    assert not device.measured
    assert math.isfinite(device.peak("float64"))


@pytest.mark.gpu
def test_gpu_is_measured_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MHC_COMPILE_CACHE_DIR", str(tmp_path))
    cost.device_of.cache_clear()
    first = cost.device_of("cuda")
    cost.device_of.cache_clear()
    assert cost.device_of("cuda") == first
    assert first.measured
    assert first.bandwidth > 1e11
    cost.device_of.cache_clear()


def test_what_cublas_holds(monkeypatch) -> None:
    assert cost.library_bytes("cpu") == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for capability, megabytes in (((9, 0), 32), ((8, 0), 8.125)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, known=capability: known)
        assert cost.library_bytes("cuda") == 2 * megabytes * 2**20
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    assert cost.library_bytes("cuda") == 2 * (2 * 4096 + 8 * 16) * 1024
