"""Trains one small Llama three times on equal tokens: plain, with hyper-connections (HC) and with mHC (``make demo``).

The text is the Python standard library's own source, read as bytes. All three start from the same weights, see the
same batches and use the same optimizer; ``torch.compile(model, backend="mhc")`` is all that asks for hyper-connections.
The table shows the loss, the time of a step, and the gain of the residual stream: the product of the sites' H_res is
what a signal that skips every branch is multiplied by, and the largest absolute row sum (forward) or column sum
(backward) of that product says how much it may grow (mHC, arXiv 2512.24880, section 3). Doubly stochastic matrices keep
it near 1; free ones do not. On a GPU the same command trains a larger model, compiled by inductor.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Size:
    """How large a run is. Tokens a step: ``batch * length``."""

    layers: int
    hidden: int
    heads: int
    length: int
    batch: int
    steps: int
    rate: float
    compiler: str  # a CPU run is over before inductor would have paid for itself

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=256,
            hidden_size=self.hidden,
            intermediate_size=round(self.hidden * 8 / 3 / 32) * 32,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=self.length,
            use_cache=False,
        )


SIZES = {
    "cpu": Size(layers=4, hidden=96, heads=4, length=96, batch=8, steps=120, rate=4e-3, compiler="eager"),
    "cuda": Size(layers=16, hidden=768, heads=12, length=1024, batch=16, steps=600, rate=6e-4, compiler="inductor"),
}
RUNS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "HC": {"variant": "hc", "init": "paper"},
    "mHC": {"variant": "mhc", "init": "paper"},
}


# ------------------------------------------------------------------------------------------------ the text
def corpus() -> tuple[Tensor, Tensor]:
    """Bytes of the standard library's sources (uint8) for training, and of every twentieth file for validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    files = [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for index, path in enumerate(files):
        parts[index % 20 == 7].append(path.read_bytes())
    train, held_out = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts)
    return train, held_out


def windows(text: Tensor, size: Size, generator: torch.Generator, device: str) -> Tensor:
    """A batch [batch, length] (int64) of windows at random places."""
    starts = torch.randint(len(text) - size.length, (size.batch,), generator=generator)
    return torch.stack([text[start : start + size.length] for start in starts.tolist()]).long().to(device)


# ------------------------------------------------------------------------------------------------ the gain
class Mixes(TorchDispatchMode):
    """Collects H_res [..., n, n] of every site of a forward, in the order of the sites."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """It only looks on; without this answer Dynamo runs no compiled code below a dispatch mode."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name == "mhc::coefficients" and result[2].numel():
            self.found.append(result[2].detach())
        return result


def gains(mixes: list[Tensor]) -> list[tuple[float, float]]:
    """(forward, backward) gain of the product of the first 1, 2, ... mixes, the mean over the tokens."""
    product = torch.eye(mixes[0].shape[-1], dtype=torch.float64)
    answer = []
    for mix in mixes:
        product = mix.double().cpu() @ product
        rows, columns = product.sum(-1).abs().amax(-1), product.sum(-2).abs().amax(-1)
        answer.append((rows.mean().item(), columns.mean().item()))
    return answer


# ------------------------------------------------------------------------------------------------ one run
@dataclass
class Run:
    """What one training run left behind: losses a step (nats a byte), seconds a step, gains after given steps."""

    name: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    gains: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    held_out: float = math.nan
    parameters: int = 0

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 10) :])

    @property
    def worst(self) -> tuple[float, float] | None:
        """The largest (forward, backward) gain of the whole product at any time it was measured."""
        ends = [each[-1] for each in self.gains.values()]
        return (max(end[0] for end in ends), max(end[1] for end in ends)) if ends else None


def train(name: str, options: dict[str, Any] | None, size: Size, device: str, text: tuple[Tensor, Tensor]) -> Run:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = LlamaForCausalLM(size.config()).to(device)
    # Made before the conversion, as in a script that knows nothing of it: the optimizer adopts the new parameters.
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=size.rate, betas=(0.9, 0.95))
    warm_up = max(1, size.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / size.steps))),
    )
    if options is None:
        compiled: Any = torch.compile(model, backend=size.compiler)
        probe: Any = compiled
    else:
        compiled = torch.compile(model, backend="mhc", options={**options, "compiler": size.compiler})
        probe = torch.compile(model, backend="mhc", options={**options, "compiler": "eager"})
    autocast = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()

    batches, checks = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    held_out = [windows(text[1], size, checks, device) for _ in range(8)]
    run = Run(name)
    for step in range(size.steps):
        ids = windows(text[0], size, batches, device)
        start = time.perf_counter()
        with autocast:
            loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        run.losses.append(loss.item())  # also waits for the device
        run.seconds.append(time.perf_counter() - start)
        if options is not None and (step == 0 or (step + 1) % max(1, size.steps // 8) == 0):
            run.gains[step + 1] = measure(probe, held_out[0])
    with torch.no_grad():
        run.held_out = statistics.fmean(probe(input_ids=ids, labels=ids).loss.item() for ids in held_out)
    run.parameters = sum(parameter.numel() for parameter in model.parameters())
    return run


@torch.no_grad()
def measure(probe: nn.Module, ids: Tensor) -> list[tuple[float, float]]:
    """Gains on one batch. The first call compiles, which a dispatch mode would prevent; the second is watched."""
    probe(input_ids=ids, labels=ids)
    with Mixes() as mixes:
        probe(input_ids=ids, labels=ids)
    return gains(mixes.found)


# ------------------------------------------------------------------------------------------------ the outcome
def table(runs: list[Run], size: Size, device: str) -> Table:
    tokens = size.steps * size.batch * size.length
    title = f"{size.layers} layers of {size.hidden}, {tokens:,} bytes of Python, {device}, compiler {size.compiler}"
    result = Table(title=title)
    for column in ("", "parameters", "loss", "held-out loss", "step [ms]", "gain forward", "gain backward"):
        result.add_column(column, justify="right" if column else "left")
    for run in runs:
        gain = [f"{value:.3g}" for value in run.worst] if run.worst else ["-", "-"]
        step = statistics.median(run.seconds[1:] or run.seconds) * 1e3
        result.add_row(run.name, f"{run.parameters:,}", f"{run.loss:.3f}", f"{run.held_out:.3f}", f"{step:.1f}", *gain)
    return result


def plot(runs: list[Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for run in runs:
        window = max(1, len(run.losses) // 25)
        smooth = [statistics.fmean(run.losses[max(0, i - window) : i + 1]) for i in range(len(run.losses))]
        line = left.plot(smooth, label=run.name)[0]
        if run.gains:
            last = run.gains[max(run.gains)]
            sites = range(1, len(last) + 1)
            right.plot(sites, [gain for gain, _ in last], color=line.get_color(), label=f"{run.name}, forward")
            right.plot(sites, [gain for _, gain in last], "--", color=line.get_color(), label=f"{run.name}, backward")
    left.set(xlabel="step", ylabel="loss [nats a byte]", title="Equal tokens, equal start")
    right.set(xlabel="site", ylabel="gain of the product of H_res", title="Gain after training", yscale="log")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> list[Run]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(SIZES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the plot (default: demo)")
    for name in ("layers", "hidden", "heads", "length", "batch", "steps"):
        parser.add_argument(
            f"--{name}", type=int, help="default: " + ", ".join(f"{getattr(s, name)} on {d}" for d, s in SIZES.items())
        )
    chosen = vars(parser.parse_args(arguments))
    device, out = chosen.pop("device"), chosen.pop("out")
    base = SIZES[device]
    size = Size(**{**vars(base), **{name: value for name, value in chosen.items() if value is not None}})

    if device == "cpu":
        torch.set_num_threads(
            1
        )  # the ops of so small a model are not worth sharing, and a busy neighbour would stall them
    console = Console()
    text = corpus()
    runs = []
    for name, options in RUNS.items():
        with console.status(f"training: {name}"):
            start = time.perf_counter()
            runs.append(train(name, options, size, device, text))
        console.print(
            f"{name}: loss {runs[-1].loss:.3f} after {size.steps} steps in {time.perf_counter() - start:.0f} s"
        )
    console.print(table(runs, size, device))
    plot(runs, out / "demo.png")
    console.print(f"plot: {out / 'demo.png'}")
    return runs


if __name__ == "__main__":
    main()
