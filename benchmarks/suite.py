"""All benchmarks that need a GPU, on one or several: python -m benchmarks.suite [part ...] [--gpus 2] [--out DIR].

A compilation takes minutes where a measurement takes seconds. So what can be compiled ahead is run twice: first row by
row, many at a time, which fills the caches of inductor and Triton (what is measured then is thrown away); then one part
after the other on each GPU, from these caches. Kernels have their fixed settings (`MHC_COMPILE_AUTOTUNE=0`), so that
two runs compare; `python -m mhc_compile tune` says what other settings would gain.

A part begins no row after its own `--seconds`, and names those that it left out, before it is stopped after
`Part.seconds`. One part alone takes at most as long as `--ahead-seconds` and that: `suite site` about eight minutes.

A part's output is written to DIR/<part>.log, its result to DIR/<name>.json (default: benchmarks/results).
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import RESULTS

AHEAD_SECONDS = 290
"""Compilations ahead are stopped then, unless told otherwise."""


@dataclass(frozen=True)
class Part:
    """One benchmark."""

    command: tuple[str, ...]
    """Module under benchmarks, and its arguments."""
    ahead: tuple[str, ...] = ()
    """Rows (values of its `--only`) that are compiled ahead, each in a process of its own: what takes longest first."""
    each: tuple[tuple[str, ...], ...] = ((),)
    """Arguments with which each of these rows is compiled ahead, again in processes of their own."""
    seconds: int = 300
    """It is stopped after that. Its own `--seconds` end earlier, so that rows without time are named."""


PARTS: dict[str, Part] = {
    "memory": Part(
        ("memory", "--seconds", "260", "--only", "plain", "off", "memory"), ("off", "memory", "plain"), seconds=400
    ),
    # Liger's first call takes 107 s a width, inductor minutes for the spelled-out rounds: a process for each width.
    "site": Part(
        ("site", "--seconds", "150"),
        (
            "Liger", "torch.compile, spelled", "mhc, native bodies through inductor", "TileKernels", "mhc",
            "mhc, single_pass", "mhc, opaque launches",
        ),
        (("--width", "4096"), ("--width", "2560")),
        seconds=190,
    ),
    "schedule": Part(("schedule", "--seconds", "145")),
    "step": Part(
        (
            "step", "--profile", "--seconds", "200", "--only", "plain, inductor", "mhc", "mhc, single_pass",
            "TileKernels", "torch.compile, spelled", "Liger", "mhc, identity",
        ),
        (
            "torch.compile, spelled", "Liger", "TileKernels", "mhc, single_pass", "mhc", "plain, inductor",
            "mhc, identity",
        ),
    ),
    "raised": Part(("raised", "--seconds", "200"), ("torch.compile", "mhc")),
    "schedule-graphs": Part(("schedule", "--inductor-graphs", "--seconds", "70")),
    "decode": Part(("decode", "--seconds", "240")),
    "ops": Part(("ops", "--seconds", "240")),
    "tuning": Part(("tuning", "--seconds", "60"), seconds=150),
}  # fmt: skip
"""What takes longest comes first."""


def arguments_of(part: Part, row: str | None = None, more: tuple[str, ...] = ()) -> list[str]:
    """The command line of a part, or of one of its rows alone with `more` arguments."""
    module, *rest = part.command
    if row is not None:
        rest = [*(rest[: rest.index("--only")] if "--only" in rest else rest), *more, "--only", row]
    return [sys.executable, "-m", f"benchmarks.{module}", *rest]


def run(command: list[str], gpu: int, log: Path, environment: dict[str, str], seconds: float) -> float:
    """Seconds that a command took; its output goes to `log`, with a line about how it ended if it failed, and with the
    Python stacks of where it was if it was stopped."""
    start = time.perf_counter()
    own = {**os.environ, "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": str(gpu), "MHC_COMPILE_AUTOTUNE": "0"}
    own |= {"PYTHONFAULTHANDLER": "1", **environment}
    with log.open("w") as output:
        process = subprocess.Popen(command, env=own, stdout=output, stderr=subprocess.STDOUT)
        try:
            status = process.wait(seconds)
            ended = "" if status == 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            _stop(process)
            ended = f"stopped after {seconds:g} s"
        if ended:
            output.write(f"{ended}\n")
    return time.perf_counter() - start


def _stop(process: subprocess.Popen[bytes], grace: float = 5.0) -> None:
    """By a signal on which Python's fault handler writes the stacks; what does not end of it is killed."""
    process.send_signal(signal.SIGABRT)
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def compile_ahead(parts: list[Part], gpus: int, jobs: int, seconds: float) -> None:
    """Every row that can be compiled ahead, `jobs` at a time, the GPUs in turn; results and calibrations are lost."""
    rows = [(part, row, more) for part in parts for row in part.ahead for more in part.each]
    end = time.perf_counter() + seconds
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:

        def one(index: int) -> None:
            part, row, more = rows[index]
            folder = Path(scratch) / str(index)
            folder.mkdir()
            threads = str(max(1, (os.cpu_count() or 1) // jobs))
            environment = {
                "BENCHMARK_RESULTS": str(folder), "MHC_COMPILE_CACHE_DIR": str(folder / "cache"),
                "TORCHINDUCTOR_COMPILE_THREADS": threads,
            }  # fmt: skip
            left = end - time.perf_counter()
            took = run(arguments_of(part, row, more), index % gpus, folder / "log", environment, max(left, 1))
            last = (folder / "log").read_text().splitlines()[-1:]
            what = " ".join((part.command[0], *more))
            print(f"ahead: {what}, {row}: {took:.0f} s  {' '.join(last)[:110]}", flush=True)

        list(pool.map(one, range(len(rows))))


def measure(names: list[str], gpus: int, out: Path) -> None:
    """The parts one after the other on each GPU: who is done takes the next."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)

    def worker(gpu: int) -> None:
        while True:
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                return
            part = PARTS[name]
            took = run(arguments_of(part), gpu, out / f"{name}.log", {"BENCHMARK_RESULTS": str(out)}, part.seconds)
            print(f"{name}: {took:.0f} s on GPU {gpu}", flush=True)

    threads = [threading.Thread(target=worker, args=(gpu,)) for gpu in range(gpus)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=8, help="compilations at a time")
    parser.add_argument("--ahead-seconds", type=float, default=AHEAD_SECONDS, help="then they are stopped")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of logs and results")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    names = [name for name in PARTS if not arguments.parts or name in arguments.parts]
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    compile_ahead([PARTS[name] for name in names], arguments.gpus, arguments.jobs, arguments.ahead_seconds)
    print(f"compiled ahead in {time.perf_counter() - start:.0f} s", flush=True)
    measure(names, arguments.gpus, arguments.out)
    print(f"all in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
