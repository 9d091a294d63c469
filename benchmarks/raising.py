"""Compile time of a model with hand-written hyper-connections: inductor alone, and with its chains raised.

    python -m benchmarks.raising [--layers 4] [--repeat 3] [--device cpu]

A decoder of ``layers`` layers (two sites each, 20 Sinkhorn iterations as in DeepSeek-V4) is compiled cold, in a
process of its own with an empty inductor cache; the time is that of the first forward and backward. The same model
with plain residuals is the yardstick. Results: ``benchmarks/results/raising_<device>.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from torch import Tensor, nn

from benchmarks.record import RESULTS, record

STREAMS, ITERATIONS, EPS = 4, 20, 1e-6
VARIANTS = {
    "plain residuals, inductor": ("plain", "inductor"),
    "hand-written mHC, mhc": ("mhc", "mhc"),
    "hand-written mHC, inductor": ("mhc", "inductor"),
}


class Branch(nn.Module):
    """Pre-norm, then causal attention or a gated MLP; [B, S, C] -> [B, S, C]."""

    def __init__(self, width: int, attention: bool) -> None:
        super().__init__()
        self.attention, self.heads = attention, width // 16
        self.norm = nn.RMSNorm(width)
        self.into = nn.Linear(width, 3 * width if attention else 4 * width, bias=False)
        self.out = nn.Linear(width if attention else 2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(self.norm(x))
        if not self.attention:
            gate, up = h.chunk(2, -1)
            return self.out(torch.nn.functional.silu(gate) * up)
        q, k, v = h.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Site(nn.Module):
    """A branch with a residual: the plain add, or mHC as one would write it."""

    def __init__(self, width: int, attention: bool, plain: bool) -> None:
        super().__init__()
        self.branch, self.plain = Branch(width, attention), plain
        if not plain:
            rows = STREAMS * (STREAMS + 2)
            self.fn = nn.Parameter(torch.randn(rows, STREAMS * width) * 0.02)
            self.base, self.scale = nn.Parameter(torch.randn(rows)), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            return x + self.branch(x)
        n = STREAMS
        flat = x.flatten(2).float()
        flat = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS)
        logits = torch.nn.functional.linear(flat, self.fn.float())
        p, q, s = logits.split([n, n, n * n], dim=-1)
        b_pre, b_post, b_res = self.base.split([n, n, n * n])
        pre = torch.sigmoid(p * self.scale[0] + b_pre) + EPS
        post = 2 * torch.sigmoid(q * self.scale[1] + b_post)
        h = (s * self.scale[2] + b_res).unflatten(-1, (n, n)).softmax(-1) + EPS
        h = h / (h.sum(-2, keepdim=True) + EPS)
        for _ in range(ITERATIONS - 1):
            h = h / (h.sum(-1, keepdim=True) + EPS)
            h = h / (h.sum(-2, keepdim=True) + EPS)
        y = self.branch((pre.unsqueeze(-1) * x).sum(2).to(x.dtype))
        return post.to(x.dtype).unsqueeze(-1) * y.unsqueeze(-2) + torch.matmul(h.to(x.dtype).transpose(-1, -2), x)


class Decoder(nn.Module):
    """Token ids [B, S] -> logits."""

    def __init__(self, layers: int, width: int, plain: bool) -> None:
        super().__init__()
        self.plain = plain
        self.embed, self.head = nn.Embedding(256, width), nn.Linear(width, 256, bias=False)
        self.sites = nn.ModuleList(Site(width, i % 2 == 0, plain) for i in range(2 * layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if not self.plain:
            x = x.unsqueeze(2).expand(-1, -1, STREAMS, -1).contiguous()
        for site in self.sites:
            x = site(x)
        return self.head(x if self.plain else x.mean(2))


def cpu_seconds() -> float:
    """Processor seconds of this process and of the compilers that it has waited for: no neighbour shows up in it."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def first_step(residual: str, backend: str, layers: int, device: str) -> dict[str, float]:
    """Seconds of the first forward and backward, i.e. of compilation, in this process; and of the raising pass."""
    torch.manual_seed(0)
    width = 64 if device == "cpu" else 1024
    model = Decoder(layers, width, residual == "plain").to(device)
    ids = torch.randint(256, (2, 64), device=device)
    options = {"rewrite": False} if backend == "mhc" else None
    compiled = torch.compile(model, backend=backend, options=options)
    start, before = time.perf_counter(), cpu_seconds()
    compiled(ids).float().square().mean().backward()
    if device != "cpu":
        torch.cuda.synchronize()
    found = {"compile_s": time.perf_counter() - start, "cpu_s": cpu_seconds() - before}
    if backend == "mhc":
        from mhc_compile.backend import reports

        found["raising_s"] = sum(result.seconds for result in reports[-1].passes if result.name == "raise_chains")
    return found


def measure(name: str, layers: int, device: str) -> dict[str, float]:
    """One cold compilation in a process of its own."""
    residual, backend = VARIANTS[name]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool: its processes would not be counted
        command = [sys.executable, "-m", "benchmarks.raising", "--one", residual, backend]
        command += ["--layers", str(layers), "--device", device]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure all variants in turn, several times, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(first_step(*arguments.one, arguments.layers, arguments.device)))
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(arguments.repeat):
        for name, found in runs.items():
            found.append(measure(name, arguments.layers, arguments.device))
            print(f"{name:28s} {found[-1]}", flush=True)
    medians = {
        name: {key: round(statistics.median(run[key] for run in found), 2) for key in found[0]}
        for name, found in runs.items()
    }
    plain = medians["plain residuals, inductor"]["cpu_s"]
    for row in medians.values():
        row["cpu_over_plain"] = round(row["cpu_s"] / plain, 2)
    path = record(
        "raising",
        medians,
        RESULTS / f"raising_{arguments.device}.json",
        what="wall and processor seconds to compile and run the first forward and backward, cold: medians",
        sites=2 * arguments.layers,
        sinkhorn_iterations=ITERATIONS,
        repeat=arguments.repeat,
    )
    print(path.read_text())


if __name__ == "__main__":
    main()
