"""Side streams: what pairs of kernels do to each other, and what a plan does to a training step.

    python -m benchmarks.schedule                     # one GPU, at most 145 s
    python -m benchmarks.schedule --skip pairs        # with the pairs that are in the cache already
    python -m benchmarks.schedule --inductor-graphs   # auto in inductor's own CUDA graphs, the small shape alone
    python -m benchmarks.schedule --two-gpus          # beside an all-reduce, on two (schedule_two.py)

On one GPU, in this order: (pairs) measure and keep the contention table; (sanitizer) PyTorch's CUDA sanitizer over a
planned graph, in a process of its own; for each shape of the step (Qwen3 layers as in benchmarks.step, trunk, forward
and backward) compile it with ``schedule="auto"``. Where that says one stream, the same step is compiled once more with
a plan: ``schedule="captured"``, for somebody who captures the step in a CUDA graph, where auto said that the host is
the bottleneck; else *forced*, every side call moved, to show what that costs. Then, in turns with one stream: times as
a CUDA graph of the whole step and with plain launches; output and gradients of 100 runs, bit by bit, two thirds of them
with the side or the main stream asleep for a random time at every fork, and those of 100 replays; a trace of one replay
with the predicted timeline beside it, and which kernels take longer than on one stream.

Everything runs on a stream of high priority. Deterministic algorithms take attention from what torch would choose to a
kernel whose backward repeats itself, so that bits can be compared; it also takes longer, and ``--usual`` leaves torch
its choice, to measure the step that is usually trained. Bits are compared only where one stream gives the same ones
each time. Parts that do not fit into ``--seconds`` are left out and named.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import random
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

from benchmarks.device import repeatable
from benchmarks.record import RESULTS, record
from benchmarks.traces import beside, changed, overlap, traced
from mhc_compile.backend import mhc, reports
from mhc_compile.lowering.side import main_parts, side_cases
from mhc_compile.scheduler import contention as contention_of
from mhc_compile.scheduler.assign import Plan
from mhc_compile.scheduler.contention import Case, Contention, interval
from mhc_compile.scheduler.emit import delayed
from mhc_compile.scheduler.schedule import using
from mhc_compile.scheduler.timeline import text

SHAPES = {"1x512": (1, 512), "1x1024": (1, 1024), "1x2048": (1, 2048), "1x4096": (1, 4096), "2x4096": (2, 4096)}
MODELS = {
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16},
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16},
}
"""Layers of Qwen3, with 8 heads of keys and 128 channels a head."""
MEASURED = (1024, 8192)
"""Tokens of the pairs: a pair stands for a third to three times its bytes."""
PARTS = ("pairs", "sanitizer", "graphs", "steps", "equal")
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
def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What both steps of a comparison have."""
    return {"variant": arguments.variant, "recompute": arguments.recompute}


class Step:
    """A compiled model, its step, and what was planned for it."""

    def __init__(
        self, arguments: argparse.Namespace, tokens: Tensor, chosen: dict[str, Any], forced: Contention | None = None
    ) -> None:
        from transformers import Qwen3Config, Qwen3Model

        config = Qwen3Config(
            **MODELS[arguments.model], num_key_value_heads=8, head_dim=128, num_hidden_layers=arguments.layers,
            vocab_size=1024, use_cache=False,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device("cuda"):
            self.model: nn.Module = Qwen3Model(config).to(dtype=torch.bfloat16).train()
        self.tokens = tokens
        self.graphs = "inductor" in chosen
        self.call: Any = torch.compile(
            self.model, backend=mhc, options={"autotune": False, **options(arguments), **chosen}
        )
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
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        # A mask of None a layer kind is the causal path without a mask.
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


def timed(
    calls: dict[str, Callable[[], object]], seconds: float = 2.0, warmup: int = 3, rounds: int | None = None
) -> dict[str, Any]:
    """Calls in turns for about so long, or for so many rounds; median milliseconds of each, and the median of the ratio
    of the second to the first, round by round, with its interval of 95 %."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for number in itertools.count():
        enough = number >= 15 and time.perf_counter() - start > seconds if rounds is None else number == rounds
        if enough:
            break
        for name in calls if number % 2 else reversed(calls):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            calls[name]()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    first, second = (times[name] for name in calls)
    ratio, low, high = interval([b / a for a, b in zip(first, second, strict=True)])
    found: dict[str, Any] = {f"{name}_ms": interval(values)[0] for name, values in times.items()}
    return found | {"ratio": ratio, "ratio_interval": [low, high], "rounds": len(first)}


def graphed(step: Step) -> torch.cuda.CUDAGraph:
    """A whole step as a CUDA graph; each node has the priority of the stream that it was captured on."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    step.model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        step()
    graph.instantiate()
    return graph


def priorities(graph: torch.cuda.CUDAGraph) -> dict[str, Any]:
    """How many kernels of a captured graph have which priority, by CUDA's own account."""
    try:
        from cuda.bindings import runtime

        def done(result: tuple[Any, ...]) -> Any:
            if int(result[0]) != 0:
                raise RuntimeError(str(result[0]))
            return result[1]

        handle = runtime.cudaGraph_t(graph.raw_cuda_graph())
        count = runtime.cudaGraphGetNodes(handle)[-1]
        kernel, found = runtime.cudaGraphNodeType.cudaGraphNodeTypeKernel, dict[str, int]()
        attribute = runtime.cudaLaunchAttributeID.cudaLaunchAttributePriority
        for node in done(runtime.cudaGraphGetNodes(handle, count)):
            if done(runtime.cudaGraphNodeGetType(node)) == kernel:
                value = str(done(runtime.cudaGraphKernelNodeGetAttribute(node, attribute)).priority)
                found[value] = found.get(value, 0) + 1
        return {"kernels_by_priority": found}
    except Exception as error:  # a question to the driver, not a part of the measurement
        return {"status": f"not read: {type(error).__name__}: {str(error)[:200]}"}


def equal(got: list[Tensor], want: list[Tensor]) -> bool:
    """The same tensors bit for bit."""
    return len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def same_bits(off: Step, on: Step, runs: int) -> dict[str, Any]:
    """How many runs of `on` give the bits of `off`; two of three with one stream asleep at every fork. Nothing is
    said where `off` itself does not repeat."""
    reference = [one.clone() for one in off.results()]
    alone = sum(equal(off.results(), reference) for _ in range(runs // 4))
    if alone < runs // 4:
        return {
            "status": f"not measurable: {runs // 4 - alone} of {runs // 4} runs on one stream differ from the first"
        }
    draw, fine, first = random.Random(0), 0, None
    for run in range(runs):
        cycles = draw.randrange(1_000, 400_000)
        with delayed(side=cycles if run % 3 == 1 else 0, main=cycles if run % 3 == 2 else 0):
            same = equal(on.results(), reference)
        fine += same
        first = run if not same and first is None else first
    return {"one_stream_repeats": f"{alone} of {alone}", "runs": runs, "equal": fine, "first_different": first}


def optimistic(found: Contention) -> Contention:
    """The table as if every side call were free: moves whatever can move."""
    free = [replace(pair, hidden=1.0, low=1.0, high=1.0, stretch=1.0) for pair in found.pairs]
    return replace(found, pairs=tuple(free))


def steps(
    name: str, arguments: argparse.Namespace, found: Contention, clock: Clock, result: dict[str, Any]
) -> tuple[Step, Step, str] | None:
    """(the step on one stream, the one with a plan, what kind of plan); what was predicted goes into `result`."""
    batch, length = SHAPES[name]
    tokens = torch.randint(0, 1024, (batch, length), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    extra: dict[str, Any] = {"inductor": {"triton.cudagraphs": True}} if arguments.inductor_graphs else {}
    auto = Step(arguments, tokens, {"schedule": "auto", **extra})
    result["auto"] = auto.facts()
    if auto.moves:
        return Step(arguments, tokens, extra), auto, "auto"
    print(f"{name}: auto is one stream: {auto.report.schedule.lines()}", flush=True)
    kinds = ["captured", "forced"] if "the host" in " ".join(auto.report.schedule.lines()) else ["forced"]
    for kind in kinds:
        if not clock.fits(f"{name}: {kind} plan", auto.compile_s + 3):
            return None
        how, table = ("captured", None) if kind == "captured" else ("auto", optimistic(found))
        on = Step(arguments, tokens, {"schedule": how, **extra}, table)
        result[kind] = on.facts()
        if on.moves:
            return auto, on, kind
    return None


def shape(name: str, arguments: argparse.Namespace, found: Contention, clock: Clock, folder: Path) -> dict[str, Any]:
    """One shape of the step: on one stream, and with a plan."""
    torch._dynamo.reset()  # not between the steps of a shape, which are all kept
    result: dict[str, Any] = {}
    both = steps(name, arguments, found, clock, result)
    if both is None:
        return result
    off, on, kind = both
    own, model = result[kind], "" if arguments.model == "4B" else f"{arguments.model}-"
    model += "usual-" if arguments.usual else ""
    print("\n".join([f"{name}: {kind} plan", *(text(plan) for plan in on.plans)]), flush=True)
    parts: dict[str, tuple[float, Callable[[], dict[str, Any]]]] = {
        "graphs": (6, lambda: in_graphs(off, on, kind, arguments.runs, folder / f"schedule-trace-{model}{name}.json")),
        "steps": (4, lambda: timed({"off": off, kind: on})),
        "equal": (6, lambda: same_bits(off, on, arguments.runs)),
    }
    for part, (seconds, measure) in parts.items():
        left_out = part not in arguments.only or (part == "graphs" and arguments.inductor_graphs)
        left_out = left_out or (part == "equal" and arguments.usual)
        if left_out or not clock.fits(f"{name}: {part}", seconds):
            continue
        try:
            own[part] = measure()
        except RuntimeError as error:  # a part that fails is a row of the table
            own[part] = {"status": f"failed: {str(error)[:400]}"}
        print(f"{name}: {part}: {own[part]}", flush=True)
    return result


def in_graphs(off: Step, on: Step, kind: str, replays: int, path: Path) -> dict[str, Any]:
    """Both steps captured and replayed in turns; the gradients of their replays; a trace of one replay of each."""
    graphs = {"off": graphed(off), kind: graphed(on)}
    found = timed({name: graph.replay for name, graph in graphs.items()})
    grads = {
        name: [one.grad for one in step.model.parameters() if one.grad is not None]
        for name, step in (("off", off), (kind, on))
    }
    reference = [one.clone() for one in grads["off"]]
    counts = dict.fromkeys(graphs, 0)
    for name, graph in graphs.items():
        for _ in range(replays):
            for one in grads[name]:
                one.zero_()
            graph.replay()
            torch.cuda.synchronize()
            counts[name] += equal(grads[name], reference)
    found |= {"replays": replays, "priorities": priorities(graphs[kind])}
    alike = counts["off"] == replays
    found["equal"] = counts[kind] if alike else f"not measurable: one stream gives {counts['off']} of {replays} equal"
    kernels = {name: traced(graph.replay) for name, graph in graphs.items()}
    found["trace"] = {"file": path.name, **overlap(kernels[kind]), "changed_us": changed(kernels["off"], kernels[kind])}
    beside(path, on.plans, kernels[kind])
    return found


def sanitizer() -> dict[str, Any]:
    """`benchmarks.schedule_sanitizer` in a process of its own; its answer, or how it failed."""
    command = [sys.executable, "-m", "benchmarks.schedule_sanitizer"]
    environment = os.environ | {"TORCH_CUDA_SANITIZER": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        return {"status": "failed: more than 60 s"}
    try:
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {"status": f"failed: exit {done.returncode}: {done.stderr[-600:]}"}
    return answer


def cases(tokens: int, width: int) -> list[Case]:
    """Our kernels as side tasks."""
    return [Case(*case) for case in side_cases(tokens, width)]


def others(tokens: int, width: int) -> list[Case]:
    """What the main stream has to do in addition."""
    return [Case(*case) for case in main_parts(tokens, width)]


def one_gpu(arguments: argparse.Namespace) -> None:
    clock = Clock(arguments.seconds)
    folder = Path(arguments.out).parent if arguments.out else RESULTS
    results: dict[str, Any] = {}
    kept = contention_of.load(torch.cuda.get_device_name())
    if "pairs" in arguments.only or kept is None:
        start = time.perf_counter()
        width = MODELS[arguments.model]["hidden_size"]
        rank = (not arguments.inductor_graphs,)  # inductor captures its graphs on a stream without priority
        kept = contention_of.calibrate(cases, others, [(tokens, width) for tokens in MEASURED], rank)
        results["pairs_s"] = round(time.perf_counter() - start, 1)
    results |= {"pairs": [asdict(pair) for pair in kept.pairs], "alone": [asdict(one) for one in kept.alone]}
    print(contention_of.table(kept), f"{results.get('pairs_s', 0)} s", sep="\n", flush=True)
    torch.cuda.empty_cache()
    if "sanitizer" in arguments.only:
        results["sanitizer"] = sanitizer()
        print(f"sanitizer: {results['sanitizer']}", flush=True)
    keep(results, arguments, clock)
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
            keep(results, arguments, clock)


def keep(results: dict[str, Any], arguments: argparse.Namespace, clock: Clock) -> None:
    """Written after every shape: a run that is cut off keeps what it has."""
    results |= {"left_out": clock.skipped, "seconds": round(time.perf_counter() - clock.start, 1)}
    kind = "schedule-inductor-graphs" if arguments.inductor_graphs else "schedule"
    kind += "" if arguments.model == "4B" else f"-{arguments.model}"
    kind += "-usual" if arguments.usual else ""
    facts = {
        "model": arguments.model,
        "usual": arguments.usual,
        "layers": arguments.layers,
        "runs": arguments.runs,
        **options(arguments),
    }
    record(kind, results, arguments.out, quiet=True, **facts)


def prepare(deterministic: bool = True, usual: bool = False) -> None:
    """Settings of a process that compares bits (`usual`: does not) and reads plans; before anything touches the device.
    Inductor puts no deterministic accumulation, which an embedding's backward is, into its own CUDA graphs."""
    if not usual:
        repeatable(deterministic)
    # A plan is reported when it is made: an artefact from the cache has none to tell.
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--two-gpus", action="store_true")
    parser.add_argument("--inductor-graphs", action="store_true")
    parser.add_argument("--usual", action="store_true", help="torch chooses algorithms: no bits are compared")
    parser.add_argument("--model", choices=list(MODELS), default="4B")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--variant", default="mhc")
    parser.add_argument("--recompute", default="off")
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=["1x1024", "2x4096"])
    parser.add_argument("--skip", nargs="*", choices=PARTS, default=[])
    parser.add_argument("--runs", type=int, default=100, help="runs that are compared bit by bit")
    parser.add_argument("--seconds", type=float, default=145.0, help="parts that do not fit are left out")
    parser.add_argument("--out", default="", help="the JSON; the trace goes beside it")
    arguments = parser.parse_args()
    arguments.only = [part for part in PARTS if part not in arguments.skip]
    if arguments.two_gpus:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
        command += ["benchmarks.schedule_two", *(["--out", arguments.out] if arguments.out else [])]
        raise SystemExit(subprocess.run(command, check=False).returncode)
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device: nothing here is decided by a CPU's clock")
    if arguments.inductor_graphs:
        arguments.shapes = ["1x1024"]
        arguments.only = [part for part in arguments.only if part != "sanitizer"]
    prepare(not arguments.inductor_graphs, arguments.usual)
    one_gpu(arguments)


if __name__ == "__main__":
    main()
