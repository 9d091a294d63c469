"""Bytes, flops and time of a node: the one truth for recompute and scheduler.

A node costs the larger of its memory time and its arithmetic time, plus one launch:

    seconds = latency + max((read + written) / bandwidth, flops / peak of the dtype)

Traffic is the least there is: every tensor argument read once, every result written once (for our ops these are the
figures of their module docstrings, n + 1 u for ``pre``, 2n + 1 u for ``post``). Views cost nothing. What inductor fuses
away is not modelled, so sums over the plain operations of a branch are upper bounds.

The device's three numbers are measured once (``measure``), kept as JSON under ``cache_directory()`` and read from there
by every later process. A CPU gets nominal numbers: nothing here is decided by a CPU's clock.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from mhc_compile.compat import size_hint


# ------------------------------------------------------------------------------------------------ the device
@dataclass(frozen=True)
class Device:
    """What a device can do."""

    name: str
    bandwidth: float
    """Bytes a second, read and written together, of a large copy."""
    flops: dict[str, float]
    """Multiply-adds counted as two, a second, of a large matmul by dtype name (``bfloat16``, ``float32``)."""
    latency: float
    """Seconds that one more small kernel takes in a row of kernels."""
    measured: bool = False

    def peak(self, dtype: str) -> float:
        """Flops a second in a dtype; another 16-bit type counts as bfloat16, anything else as float32."""
        return self.flops.get("bfloat16" if dtype in ("bfloat16", "float16") else "float32", 1e12)


CPU = Device("cpu", 1e10, {"bfloat16": 5e10, "float32": 5e10}, 5e-6)
"""Nominal: a core or two of a server."""
GPU = Device("gpu", 2e12, {"bfloat16": 4e14, "float32": 4e13}, 3e-6)
"""Nominal, for a GPU that cannot be measured just now."""

_COPY_BYTES = 2**28  # five times the largest L2 of today
_MATMUL = 4096


def cache_directory() -> Path:
    """``MHC_COMPILE_CACHE_DIR``, else ``mhc_compile`` in the user's cache directory."""
    given = os.environ.get("MHC_COMPILE_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mhc_compile"


def cache_file(kind: str, device: str) -> Path:
    """Where what was measured of a device (by this torch) is kept; ``kind`` is the first word of the file's name."""
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", f"{device} torch {torch.__version__}").lower()
    return cache_directory() / f"{kind}-{slug}.json"


def load(name: str) -> Device | None:
    """The measured numbers of a device, None if there are none yet (or the file cannot be used)."""
    try:
        data = json.loads(cache_file("cost", name).read_text(encoding="utf-8"))
        device = Device(**data)
        numbers = [device.bandwidth, device.latency, *device.flops.values()]
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    fine = all(isinstance(number, float) and math.isfinite(number) and number > 0 for number in numbers)
    return device if fine and device.name == name else None


def keep_json(path: Path, data: dict[str, Any], sort_keys: bool = False) -> Path | None:
    """Write a file of the cache, whole or not at all: another process may be reading it. None where the directory
    cannot be written to, which is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1, sort_keys=sort_keys)
        os.replace(temporary, path)
    except OSError:
        return None
    return path


def save(device: Device) -> None:
    """Keep the numbers for later processes; a directory that cannot be written to is no error."""
    keep_json(cache_file("cost", device.name), asdict(device))


@functools.cache
def device_of(kind: str, index: int = 0) -> Device:
    """The numbers of ``cpu`` or of the ``cuda`` device `index`: from the cache, else measured now and cached."""
    if kind != "cuda" or not torch.cuda.is_available():
        return CPU
    name = torch.cuda.get_device_name(index)
    device = load(name)
    if device is None:
        if torch.cuda.mem_get_info(index)[0] < 8 * _COPY_BYTES:
            return GPU
        device = measure(torch.device("cuda", index))
        save(device)
    return device


def measure(device: torch.device) -> Device:
    """Measure a CUDA device: a copy of 256 MiB, matmuls of 4096, a row of one-element kernels; about 0.1 s."""
    with torch.no_grad():
        copy = _copy_seconds(device)
        peaks = {}
        for dtype in (torch.bfloat16, torch.float32):
            a = torch.randn(_MATMUL, _MATMUL, device=device, dtype=dtype)
            peaks[str(dtype).removeprefix("torch.")] = 2.0 * _MATMUL**3 / _seconds(lambda a=a: a @ a, 10)
        one = torch.zeros(1, device=device)
        latency = _seconds(lambda: one.add_(1.0), 300)
    return Device(torch.cuda.get_device_name(device), 2.0 * _COPY_BYTES / copy, peaks, latency, measured=True)


def library_bytes(kind: str, index: int = 0) -> int:
    """Bytes that cuBLAS holds through PyTorch's allocator while a model trains: one workspace for the thread that runs
    the forward and one for autograd's (ATen/cuda/CUDABlas and CublasHandlePool). 0 where there is no cuBLAS."""
    if kind != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return 0
    asked = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if asked:
        return 2 * sum(int(size) * int(count) * 1024 for size, count in asked)
    large = torch.cuda.get_device_capability(index) in ((9, 0), (10, 0))
    return 2 * (8 * 4096 * 1024 if large else 2 * 4096 * 1024 + 8 * 16 * 1024)


def _copy_seconds(device: torch.device) -> float:
    source = torch.randn(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return _seconds(lambda: target.copy_(source), 20)


def _seconds(call: Any, repeats: int) -> float:
    """Mean seconds of a call on the current CUDA stream, after two for warming up. The device sleeps until the host has
    asked for all of them: else what is measured of a small kernel is the host (20 us a launch on a slow one for 2)."""
    slept, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    call(), call()
    cycles = 2_000_000
    for _ in range(5):
        torch.cuda._sleep(cycles)
        slept.record()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        asleep = not slept.query()
        end.synchronize()
        if asleep:
            break
        cycles *= 4
    return float(start.elapsed_time(end)) / 1e3 / repeats


# ------------------------------------------------------------------------------------------------ the work of a node
@dataclass(frozen=True)
class Work:
    """Least traffic in bytes, and arithmetic."""

    read: int = 0
    written: int = 0
    flops: int = 0
    dtype: str = "float32"

    @property
    def bytes(self) -> int:
        """Read and written together."""
        return self.read + self.written

    def seconds(self, device: Device) -> float:
        """Time on a device; nothing to move takes no time."""
        if self.bytes == 0:
            return 0.0
        return device.latency + max(self.bytes / device.bandwidth, self.flops / device.peak(self.dtype))


_VIEWS = frozenset(
    """
    view reshape view_as permute transpose t movedim swapaxes unsqueeze squeeze expand expand_as select narrow getitem
    chunk split flatten unflatten detach contiguous size dim placeholder get_attr output alias numel unbind tensor_split
    """.split()
)

_CONTRACTING = frozenset("linear matmul mm bmm addmm baddbmm matvec mv __matmul__ einsum".split())


def target_name(node: fx.Node) -> str:
    """The bare name of what a node calls: ``linear``, ``mul``, ``pre``."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return node.op
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket.__name__)
    return str(getattr(node.target, "__name__", node.target))


def is_view(node: fx.Node) -> bool:
    """True where the node moves no data (``contiguous`` and ``reshape`` counted as if they never had to)."""
    ours = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "mhc"  # mhc::expand copies
    return not ours and target_name(node) in _VIEWS


def value_of(node: Any) -> Any:
    """The fake value of a node on either level (torch or ATen); what is no node is its own value."""
    if not isinstance(node, fx.Node):
        return node
    return node.meta["example_value"] if "example_value" in node.meta else node.meta.get("val")


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors of a value, one or several."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)


def elements(value: Any) -> int:
    """Number of elements of all tensors of a value; an open size counts as its hint."""
    return sum(math.prod(size_hint(size) for size in tensor.shape) for tensor in tensors_of(value))


def bytes_of(value: Any) -> int:
    """Bytes of all tensors of a value (of a node: of its result); an open size counts as its hint."""
    value = value_of(value)
    return sum(elements(tensor) * tensor.element_size() for tensor in tensors_of(value))


def work(node: fx.Node) -> Work:
    """The work of one node of a torch-level or ATen graph with fake values."""
    if is_view(node):
        return Work()
    result = value_of(node)
    first = next(tensors_of(result), None)
    dtype = str(first.dtype).removeprefix("torch.") if first is not None else "float32"
    read = sum(bytes_of(argument) for argument in node.all_input_nodes)
    return Work(read, bytes_of(node), _flops(node, result), dtype)


def seconds(node: fx.Node, device: Device) -> float:
    """Time of one node on a device."""
    return work(node).seconds(device)


def _flops(node: fx.Node, result: Any) -> int:
    name = target_name(node)
    shapes = [[size_hint(size) for size in value.shape] for value in map(value_of, node.args) if _is_tensor(value)]
    count = elements(result)
    if name in _CONTRACTING and shapes and shapes[0]:
        inner = shapes[1] if name in ("addmm", "baddbmm") and len(shapes) > 1 else shapes[0]
        return 2 * count * inner[-1]
    if name.startswith("conv") and len(shapes) > 1:
        return 2 * count * math.prod(shapes[1][1:])
    if "scaled_dot_product" in name and len(shapes) > 1:
        causal = bool(node.kwargs.get("is_causal", False))
        return (2 if causal else 4) * math.prod(shapes[0]) * shapes[1][-2]
    if name == "coefficients" and len(shapes) > 1:
        return 2 * math.prod(shapes[0][:-2]) * math.prod(shapes[1])
    return count


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
