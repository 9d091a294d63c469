"""Side streams: what pairs of kernels do to each other, and what a plan does to a training step.

    python -m benchmarks.schedule                     # one GPU, about two minutes on an H200
    python -m benchmarks.schedule --skip pairs        # with the pairs that are in the cache already
    python -m benchmarks.schedule --two-gpus          # beside an all-reduce, on two

On one GPU, in this order: (pairs) measure and keep the contention table; for each shape of the step (Qwen3 layers as in
benchmarks.step, trunk, forward and backward) compile it with ``schedule`` off and with ``auto``; where auto says "one
stream", a third plan is *forced*, all side calls moved, to show what it would cost. Then, for the plan that has moves:
step times in turns (off, on, off, on ..) with plain launches and as a CUDA graph of the whole step; outputs and
gradients of 100 runs against those of one stream, bit by bit, in two thirds of which the side or the main stream sleeps
for a random time at every fork; a trace of the profiler with the predicted timeline beside it.

Everything runs on a stream of high priority. Attention's backward is set to be deterministic in all rows, or no two
runs would be equal. Parts that do not fit into ``--seconds`` are left out and named.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn

from benchmarks.record import RESULTS, record
from mhc_compile.backend import mhc, reports
from mhc_compile.lowering.side import side_cases
from mhc_compile.scheduler import contention as contention_of
from mhc_compile.scheduler.assign import Plan
from mhc_compile.scheduler.contention import Case, Contention, Pair
from mhc_compile.scheduler.emit import delayed
from mhc_compile.scheduler.schedule import using
from mhc_compile.scheduler.timeline import text, write_trace

SHAPES = {"2x4096": (2, 4096), "1x1024": (1, 1024)}
PARTS = ("pairs", "steps", "equal", "graphs", "trace")
WIDTH = 2560


class Clock:
    """What is left of the time that the whole run may take."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.perf_counter(), seconds
        self.skipped: list[str] = []

    def fits(self, part: str, seconds: float) -> bool:
        """True if a part of about so many seconds still fits; else it is noted."""
        fine = time.perf_counter() - self.start + seconds <= self.seconds
        if not fine:
            self.skipped.append(part)
            print(f"left out, no time: {part}", flush=True)
        return fine


# ------------------------------------------------------------------------------------------------ a step
class Step:
    """A compiled model, its step, and what was planned for it."""

    def __init__(self, layers: int, tokens: Tensor, options: dict[str, Any], forced: Contention | None = None) -> None:
        from transformers import Qwen3Config, Qwen3Model

        config = Qwen3Config(
            hidden_size=WIDTH, intermediate_size=9728, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
            num_hidden_layers=layers, vocab_size=1024, use_cache=False,
        )  # fmt: skip
        torch.manual_seed(0)
        self.model: nn.Module = Qwen3Model(config).to(device="cuda", dtype=torch.bfloat16).train()
        self.tokens = tokens
        self.call: Any = torch.compile(self.model, backend=mhc, options=options)
        start = time.perf_counter()
        if forced is None:
            self()
        else:
            with using(forced, least_gain=0.0):
                self()
        torch.cuda.synchronize()
        self.compile_s = time.perf_counter() - start
        self.report = reports[-1]
        with torch.no_grad():  # hyper-connections that do something: the start preserves the plain model
            generator = torch.Generator(device="cuda").manual_seed(1)
            for name, parameter in self.model.named_parameters():
                if ".mhc" in name:
                    noise = torch.randn(parameter.shape, generator=generator, device="cuda")
                    parameter.add_((noise * 0.02).to(parameter.dtype))

    def __call__(self) -> Tensor:
        """One forward and backward; the output. Gradients are made anew each time."""
        self.model.zero_grad(set_to_none=True)
        # A mask of None a layer kind is the causal flash path.
        out = self.call(input_ids=self.tokens, attention_mask={"full_attention": None}, use_cache=False)
        hidden: Tensor = out.last_hidden_state
        hidden.float().square().mean().backward()
        return hidden

    def results(self) -> list[Tensor]:
        """Output and all gradients of one step."""
        out = self().detach()
        return [out, *(one.grad for one in self.model.parameters() if one.grad is not None)]

    @property
    def plans(self) -> list[Plan]:
        """The plans of the forward and of the backward graph."""
        return self.report.schedule.plans

    @property
    def moves(self) -> int:
        """Calls on the side stream, both graphs together."""
        return sum(len(plan.moves) for plan in self.plans)

    def facts(self) -> dict[str, Any]:
        """What was predicted."""
        return {
            "compile_s": round(self.compile_s, 1),
            "moves": self.moves,
            "report": self.report.schedule.lines(),
            "predicted": [
                {"graph": p.name, "one_ms": p.serial * 1e3, "two_ms": p.predicted * 1e3, "gain": p.gain}
                for p in self.plans
            ],
        }


def timed(calls: dict[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, Any]:
    """Calls in turns; median milliseconds of each, and of the ratio of the second to the first, round by round."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in calls if number % 2 else reversed(calls):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            calls[name]()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    first, second = (times[name] for name in calls)
    ratios = sorted(b / a for a, b in zip(first, second, strict=True))
    found: dict[str, Any] = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    quarter = len(ratios) // 4
    return found | {"ratio": statistics.median(ratios), "ratio_quartiles": [ratios[quarter], ratios[-1 - quarter]]}


def graphed(step: Step) -> torch.cuda.CUDAGraph:
    """A whole step as a CUDA graph; its main nodes have the priority of the current stream."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    step.model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        step()
    return graph


def same_bits(reference: list[Tensor], step: Step, runs: int) -> dict[str, Any]:
    """How many runs give the reference bit for bit; two of three with one stream asleep at every fork."""
    draw, equal, first = random.Random(0), 0, None
    for run in range(runs):
        cycles = draw.randrange(1_000, 400_000)
        with delayed(side=cycles if run % 3 == 1 else 0, main=cycles if run % 3 == 2 else 0):
            got = step.results()
        fine = len(got) == len(reference) and all(torch.equal(a, b) for a, b in zip(got, reference, strict=True))
        equal += fine
        first = run if not fine and first is None else first
    return {"runs": runs, "equal": equal, "first_different": first}


def optimistic(found: Contention) -> Contention:
    """The table as if every side call were free: moves whatever can move."""
    return replace(found, pairs=tuple(replace(pair, hidden=1.0, stretch=1.0) for pair in found.pairs))


def shape(name: str, arguments: argparse.Namespace, found: Contention, clock: Clock, folder: Path) -> dict[str, Any]:
    """One shape of the step: off, auto, forced."""
    torch._dynamo.reset()  # not between the steps of a shape, which are all kept
    batch, length = SHAPES[name]
    tokens = torch.randint(0, 1024, (batch, length), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    off = Step(arguments.layers, tokens, {})
    reference = [one.clone() for one in off.results()]
    again = off.results()
    result: dict[str, Any] = {
        "off": {"compile_s": round(off.compile_s, 1)},
        "one_stream_repeats": all(torch.equal(a, b) for a, b in zip(reference, again, strict=True)),
    }
    on = Step(arguments.layers, tokens, {"schedule": "auto"})
    result["auto"] = on.facts()
    kind = "auto"
    if not on.moves:
        print(f"{name}: auto is one stream: {on.report.schedule.lines()}", flush=True)
        del on
        gc.collect()
        if not clock.fits(f"{name}: forced plan", 20):
            return result
        on, kind = Step(arguments.layers, tokens, {"schedule": "auto"}, optimistic(found)), "forced"
        result["forced"] = on.facts()
    print("\n".join([f"{name}: {kind} plan", *(text(plan) for plan in on.plans)]), flush=True)
    own = result[kind]
    if "steps" in arguments.only and clock.fits(f"{name}: steps", 4):
        own["step"] = timed({"off": off, kind: on}, arguments.rounds)
        print(f"{name}: {own['step']}", flush=True)
    if "equal" in arguments.only and clock.fits(f"{name}: equal", 10):
        own["equal"] = same_bits(reference, on, arguments.runs)
        print(f"{name}: {own['equal']}", flush=True)
    if "trace" in arguments.only and clock.fits(f"{name}: trace", 4):
        own["trace"] = str(trace(on, folder / f"schedule-trace-{name}.json").name)
    if "graphs" in arguments.only and clock.fits(f"{name}: graphs", 6):
        try:
            own["graphs"] = in_graphs(off, on, kind, reference, arguments.rounds)
        except RuntimeError as error:  # a capture that fails is a row of the table
            own["graphs"] = {"status": f"failed: {str(error)[:400]}"}
        print(f"{name}: {own['graphs']}", flush=True)
    return result


def in_graphs(off: Step, on: Step, kind: str, reference: list[Tensor], rounds: int) -> dict[str, Any]:
    """Both steps captured and replayed in turns; the gradients of the second one's last replay."""
    graphs = {"off": graphed(off), kind: graphed(on)}
    found = timed({name: graph.replay for name, graph in graphs.items()}, rounds)
    equal, grads = 0, [one.grad for one in on.model.parameters() if one.grad is not None]
    for _ in range(20):
        for one in grads:
            one.zero_()
        graphs[kind].replay()
        torch.cuda.synchronize()
        equal += all(torch.equal(a, b) for a, b in zip(grads, reference[1:], strict=True))
    return found | {"replays": 20, "equal": equal}


def trace(step: Step, path: Path) -> Path:
    """One step under the profiler, the predicted timelines beside it."""
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as run:
        step()
        torch.cuda.synchronize()
    measured = path.with_suffix(".measured.json")
    measured.parent.mkdir(parents=True, exist_ok=True)
    run.export_chrome_trace(str(measured))
    written = write_trace(path, {plan.name: plan for plan in step.plans}, measured)
    measured.unlink()
    return written


def cases(tokens: int, width: int) -> list[Case]:
    """Our kernels as side tasks."""
    return [Case(*case) for case in side_cases(tokens, width)]


def one_gpu(arguments: argparse.Namespace) -> None:
    clock = Clock(arguments.seconds)
    folder = Path(arguments.out).parent if arguments.out else RESULTS
    results: dict[str, Any] = {}
    kept = contention_of.load(torch.cuda.get_device_name())
    if "pairs" in arguments.only or kept is None:
        start = time.perf_counter()
        kept = contention_of.calibrate(cases, sizes=[(batch * length, WIDTH) for batch, length in SHAPES.values()])
        results["pairs_s"] = round(time.perf_counter() - start, 1)
    results["pairs"] = [asdict(pair) for pair in kept.pairs]
    print(contention_of.table(kept), flush=True)
    torch.cuda.empty_cache()
    with torch.cuda.stream(torch.cuda.Stream(priority=-1)):
        for name in arguments.shapes:
            if not clock.fits(name, 25):
                continue
            try:
                results[name] = shape(name, arguments, kept, clock, folder)
            except Exception as error:  # a failing shape is a row of the table, and the pairs are kept
                results[name] = {"status": f"failed: {type(error).__name__}: {str(error)[:600]}"}
                print(f"{name}: {results[name]['status']}", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    results["left_out"] = clock.skipped
    results["seconds"] = round(time.perf_counter() - clock.start, 1)
    record("schedule", results, arguments.out, layers=arguments.layers, runs=arguments.runs)


# ------------------------------------------------------------------------------------------------ two GPUs
def beside_communication(tokens: int, payload: Tensor, repeat: int) -> list[Pair]:
    """Our kernels while an all-reduce of `payload` is on the wire, against one behind the other; by events."""
    import torch.distributed as dist

    main, found = torch.cuda.current_stream(), []

    def reduce(beside: Callable[[], object] | None) -> None:
        work = dist.all_reduce(payload, async_op=True)
        assert work is not None  # async_op
        if beside is not None:
            beside()
        work.wait()

    def seconds(call: Callable[[], object]) -> float:
        times = []
        for _ in range(repeat + 2):
            dist.barrier()
            torch.cuda.synchronize()
            torch.cuda._sleep(2_000_000)  # the host is ahead of both streams
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(main)
            call()
            end.record(main)
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times[2:])

    only = seconds(lambda: reduce(None))
    for case in cases(tokens, WIDTH):
        alone = seconds(lambda case=case: [case.call() for _ in range(8)]) / 8
        many = max(1, int(0.5 * only / alone))

        def row(case: Case = case, many: int = many) -> None:
            for _ in range(many):
                case.call()

        serial, both = only + alone * many, seconds(lambda row=row: reduce(row))
        hidden = (serial - both) / (alone * many)
        for priority in (False, True):
            found.append(Pair("communication", case.kind, case.bytes, priority, only, alone, hidden, hidden, hidden, 1.0))
    return found


def parallel_layer(tokens: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Four hyper-connected feed-forward sites whose second matmul is split over the ranks: an all-reduce in each."""
    import torch.distributed as dist
    from torch.distributed._functional_collectives import all_reduce

    from mhc_compile.ops import CoefficientSpec

    spec, group, torch_ops = CoefficientSpec(), dist.group.WORLD, torch.ops.mhc
    attributes = spec.op_arguments()  # Dynamo of torch 2.11 cannot trace the making of it

    def function(x: Tensor, up: Tensor, down: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor) -> Tensor:
        state = torch_ops.expand(x, 4)
        for _ in range(4):
            pre, post, res, _ = torch_ops.coefficients(state, phi, bias, alpha, alpha, alpha, **attributes)
            u = torch_ops.pre(state, pre)
            y = all_reduce(nn.functional.silu(u @ up) @ down, "sum", group)
            state = torch_ops.post(state, y, post, res, False)
        return torch_ops.collapse(state, "mean")

    make = torch.Generator(device="cuda").manual_seed(dist.get_rank())

    def random_of(*sizes: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(*sizes, device="cuda", generator=make) * scale).to(dtype)

    inputs = [
        random_of(1, tokens, WIDTH), random_of(WIDTH, 4864, scale=0.02), random_of(4864, WIDTH, scale=0.02),
        random_of(spec.rows, 4 * WIDTH, scale=0.02, dtype=torch.float32), torch.zeros(spec.rows, device="cuda"),
        torch.tensor(0.1, device="cuda"),
    ]  # fmt: skip
    for tensor in (inputs[0], *inputs[3:]):
        dist.broadcast(tensor, 0)
    return function, inputs


def compiled_layer(function: Callable[..., Tensor], table: Contention | None) -> tuple[Callable[..., Tensor], Any]:
    """Through inductor with our passes; planned with `table`, or on one stream."""
    from mhc_compile.config import Options
    from mhc_compile.lowering.base import LoweringLog
    from mhc_compile.lowering.inductor import config_patches
    from mhc_compile.lowering.side import split_coefficients
    from mhc_compile.scheduler.schedule import ScheduleLog, schedule_patches

    torch._dynamo.reset()
    log, patches = ScheduleLog(), config_patches(Options(), LoweringLog())
    if table is not None:
        with using(table, least_gain=0.0):
            patches = schedule_patches(patches, log, split_coefficients, "benchmark")
    options: Any = patches
    call: Callable[..., Tensor] = torch.compile(function, fullgraph=True, options=options)
    return call, log


def worker(arguments: argparse.Namespace) -> None:
    """One of two ranks."""
    import torch.distributed as dist

    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    results: dict[str, Any] = {}
    payload = torch.randn(100 * 2**20, device="cuda").to(torch.bfloat16)  # gradients of a layer of the Qwen3 shape
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream(priority=-1)):
        pairs = [one for size in (1024, 8192) for one in beside_communication(size, payload, 7)]
        results["pairs"] = [asdict(pair) for pair in pairs]
        kept = contention_of.load(torch.cuda.get_device_name()) or Contention(torch.cuda.get_device_name())
        table = replace(kept, pairs=(*kept.pairs, *pairs))
        for size in (1024, 8192):
            function, inputs = parallel_layer(size)
            off, _ = compiled_layer(function, None)
            reference = off(*inputs).clone()
            on, log = compiled_layer(function, table)
            equal = sum(torch.equal(on(*inputs), reference) for _ in range(100))
            times = timed(
                {"off": lambda off=off, inputs=inputs: off(*inputs), "on": lambda on=on, inputs=inputs: on(*inputs)}, 21
            )
            results[f"parallel layers, {size} tokens"] = times | {
                "plan": log.lines(), "moves": sum(len(plan.moves) for plan in log.plans), "equal": equal, "runs": 100
            }  # fmt: skip
    dist.barrier()
    if rank == 0:
        print(contention_of.table(Contention("two GPUs", tuple(pairs))))
        for name, row in results.items():
            if name != "pairs":
                print(f"{name}: {row}")
        record("schedule-two-gpus", results, arguments.out)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--two-gpus", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--skip", nargs="*", choices=PARTS, default=[])
    parser.add_argument("--runs", type=int, default=100, help="runs that are compared bit by bit")
    parser.add_argument("--rounds", type=int, default=31, help="pairs of timed steps")
    parser.add_argument("--seconds", type=float, default=145.0, help="parts that do not fit are left out")
    parser.add_argument("--out", default="", help="the JSON; the trace goes beside it")
    arguments = parser.parse_args()
    arguments.only = [part for part in PARTS if part not in arguments.skip]
    if arguments.two_gpus:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
        command += ["benchmarks.schedule", "--worker", *(["--out", arguments.out] if arguments.out else [])]
        raise SystemExit(subprocess.run(command, check=False).returncode)
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device: nothing here is decided by a CPU's clock")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set through its module
    # A plan is reported when it is made: an artefact from the cache has none to tell.
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False
    if arguments.worker:
        worker(arguments)
    else:
        one_gpu(arguments)


if __name__ == "__main__":
    main()
