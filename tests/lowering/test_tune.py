"""Settings of kernels: the table on disk, the rule, the budget, and the constants of a lowered graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from mhc_compile import cost
from mhc_compile.compat import fake_inputs, outside_of_tracing, triton_version
from mhc_compile.config import Options
from mhc_compile.lowering import tune
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.lowering.inductor import LaunchPass
from tests.lowering.hopper import compiler_missing

FIXED: tune.Config = {"BC": 1024, "num_warps": 4}
SMALL: tune.Config = {"BC": 256, "num_warps": 1}
LARGE: tune.Config = {"BC": 2048, "num_warps": 8}
GPU = "Some GPU"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache directory of its own, and a process that has asked nothing yet."""
    monkeypatch.setenv("MHC_COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tune, "_chosen", {})


@pytest.fixture
def another_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Forgets what this process has answered."""
    return lambda: monkeypatch.setattr(tune, "_chosen", {})


class Bench:
    """A `run` with given times; a time that is an exception is raised. `takes` seconds pass on the clock a call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, takes: float = 0.1, **times: Any) -> None:
        self.times, self.takes, self.now = times, takes, 0.0
        self.calls: list[int] = []
        monkeypatch.setattr(tune, "_clock", lambda: self.now)

    def __call__(self, config: tune.Config) -> float:
        self.calls.append(config["BC"])
        self.now += self.takes
        found = self.times[f"b{config['BC']}"]
        found = found.pop(0) if isinstance(found, list) else found
        if isinstance(found, Exception):
            raise found
        return float(found)


def ask(run: Any, key: str = "post", **more: Any) -> tune.Choice:
    return tune.choose("post", key, FIXED, [SMALL, LARGE], run, GPU, **more)


# ------------------------------------------------------------------------------------------------ the rule
def test_the_fastest_wins_and_is_looked_at_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, b1024=1.0, b256=0.9, b2048=0.8)
    choice = ask(bench)
    assert (choice.config, choice.gain, choice.tried, choice.source) == (LARGE, 0.2, 3, "measured")
    assert bench.calls == [1024, 256, 2048, 2048, 1024]
    assert choice.seconds == pytest.approx(0.5)
    line = "post: BC=2048 num_warps=8, 20.0% faster than the fixed setting, best of 3, measured in 0.5 s"
    assert choice.line() == line


@pytest.mark.parametrize("times", [{"b256": 0.985}, {"b256": [0.5, 0.99]}, {"b256": 1.5}])
def test_the_fixed_setting_stays_without_a_clear_winner(monkeypatch: pytest.MonkeyPatch, times: dict[str, Any]) -> None:
    """Less than the margin; a first look that the second does not confirm; slower."""
    choice = ask(Bench(monkeypatch, b1024=1.0, b2048=1.1, **times))
    assert (choice.config, choice.gain, choice.source) == (FIXED, 0.0, "measured")
    assert "the fixed setting" in choice.line()


def test_what_does_not_compile_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = ask(Bench(monkeypatch, b1024=1.0, b256=RuntimeError("out of resource"), b2048=0.5))
    assert (choice.config, choice.tried) == (LARGE, 2)


def test_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting is begun only if one like the slowest so far would end in time; the fixed one always is."""
    bench = Bench(monkeypatch, takes=0.8, b1024=1.0, b256=0.5, b2048=0.1)
    choice = ask(bench)
    assert choice.config == SMALL
    assert 2048 not in bench.calls, "1.6 s are gone, and it would take 0.8 s"
    slow = Bench(monkeypatch, takes=5.0, b1024=1.0)
    assert ask(slow, "another").config == FIXED
    assert slow.calls == [1024]
    assert ask(Bench(monkeypatch, takes=5.0, b1024=1.0, b256=0.5, b2048=0.1), "third", budget=100.0).config == LARGE


@pytest.mark.parametrize("where", ["b1024", "b256"])
def test_no_memory(monkeypatch: pytest.MonkeyPatch, another_process: Callable[[], None], where: str) -> None:
    """The fixed setting, for as long as this process lives; the next one asks again."""
    times = {"b1024": 1.0, "b256": 0.5, "b2048": 0.6} | {where: torch.OutOfMemoryError("full")}
    choice = ask(Bench(monkeypatch, **times))
    assert choice.config == FIXED
    assert "memory" in choice.line()
    fine = Bench(monkeypatch, b1024=1.0, b256=0.5, b2048=0.6)
    assert ask(fine) == choice
    assert not fine.calls
    assert not tune.load(GPU).entries
    another_process()
    assert ask(fine).config == SMALL


def test_without_a_time_of_the_fixed_setting_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = ask(Bench(monkeypatch, b1024=RuntimeError("a CUDA graph is being captured")))
    assert choice.config == FIXED
    assert "captured" in choice.line()
    assert not tune.load(GPU).entries


# ------------------------------------------------------------------------------------------------ on disk
def test_a_hit_measures_nothing(monkeypatch: pytest.MonkeyPatch, another_process: Callable[[], None]) -> None:
    bench = Bench(monkeypatch, b1024=1.0, b256=0.5, b2048=0.6)
    ask(bench)
    another_process()
    calls = list(bench.calls)
    choice = ask(bench)
    assert (choice.config, choice.source, choice.gain) == (SMALL, "disk", 0.5)
    assert bench.calls == calls
    assert choice.line().endswith("best of 3, from disk")


def test_one_answer_a_process_whatever_happens_to_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, b1024=1.0, b256=0.5, b2048=0.6)
    first = ask(bench)
    tune.clear(GPU)
    assert ask(bench) == first


def test_files_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process has written in the meantime stays, and of one question its answer counts."""
    theirs = tune.Choice("post", LARGE, 0.3, 1.0, 3)

    def meanwhile(config: tune.Config) -> float:
        tune.keep(GPU, "post", theirs, [FIXED, SMALL, LARGE])
        tune.keep(GPU, "pre", tune.Choice("pre", SMALL, 0.1, 1.0, 3), [SMALL])
        return {256: 0.5}.get(config["BC"], 1.0)

    assert ask(meanwhile).config == LARGE
    ask(Bench(monkeypatch, b1024=1.0, b256=0.5, b2048=0.6), "third")
    assert {key: entry["config"] for key, entry in tune.load(GPU).entries.items()} == {
        "post": LARGE,
        "pre": SMALL,
        "third": SMALL,
    }


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"generation": 0, "entries": []}', '{"generation": 0, "entries": {"post": {"config": 3}}}',
     '{"generation": 0, "entries": {"post": {"config": {"BC": 7}, "gain": 0.5, "seconds": 1.0, "tried": 2}}}'],
)  # fmt: skip
def test_a_file_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Neither broken text nor a setting that nobody offers any more decides anything."""
    cost.cache_file("tuning", GPU).write_text(text, encoding="utf-8")
    choice = ask(Bench(monkeypatch, b1024=1.0, b256=0.5, b2048=0.6))
    assert (choice.config, choice.source) == (SMALL, "measured")
    assert tune.load(GPU).entries["post"]["config"] == SMALL


def test_a_directory_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MHC_COMPILE_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert ask(Bench(monkeypatch, b1024=1.0, b256=0.5, b2048=0.6)).config == SMALL


def test_clearing_and_replacing(monkeypatch: pytest.MonkeyPatch, another_process: Callable[[], None]) -> None:
    """Additions leave the generation as it is; it counts what makes compiled graphs stale."""
    bench = Bench(monkeypatch, b1024=1.0, b256=0.5, b2048=0.6)
    ask(bench), ask(bench, "second")
    assert tune.load(GPU).generation == 0
    another_process()
    assert ask(Bench(monkeypatch, b1024=1.0, b256=0.5, b2048=0.4), again=True).config == LARGE
    assert tune.load(GPU).generation == 1
    assert tune.clear(GPU) == 2
    assert tune.load(GPU) == tune.Table(2)
    assert tune.clear(GPU) == 0


def test_identity_asks_no_idle_device() -> None:
    if not torch.cuda.is_initialized():
        assert tune.identity() == ()


# ------------------------------------------------------------------------------------------------ the question
def test_what_a_choice_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(
        tokens: int = 100, dtype: Any = torch.bfloat16, source: str = "", configs: Any = (FIXED,), n: int = 4
    ) -> str:
        return tune.question("post", source, [torch.ones(tokens, n, 8, dtype=dtype), 3], {"C": 8, "N": n}, configs)

    assert key() == key(tokens=128)
    others = [key(129), key(dtype=torch.float32), key(source="t"), key(configs=(FIXED, SMALL)), key(n=2)]
    assert len({key(), *others}) == 6
    before = key()
    monkeypatch.setattr(tune, "triton_version", lambda: "another")
    assert key() != before
    assert "T<=128 bfloat16 C=8,N=4" in key()


def test_no_session_no_question() -> None:
    """Kernels on a CPU, or launched outside of a compile, keep their fixed setting."""
    asked: list[int] = []

    def others() -> list[tune.Config]:
        asked.append(1)
        return [SMALL]

    def start(*_: Any) -> None:
        raise AssertionError

    args = [torch.ones(8, 4, 16)]
    assert tune.current() is None
    assert tune.setting(None, args, {}, FIXED, others, start) == FIXED
    with tune.session(tune.Session()):
        assert tune.setting(None, args, {}, FIXED, others, start) == FIXED
        with tune.session(None):
            assert tune.current() is None
    assert not asked


# ------------------------------------------------------------------------------------------------ lowered graphs
needs_triton = pytest.mark.skipif(compiler_missing(), reason="needs Triton")


def lowered_post(
    options: Options, log: LoweringLog, tokens: int = 8192, width: int = 4096, dynamic: bool = False
) -> dict[str, Any]:
    """The constants of `post` for fake tensors on a GPU that need not be there, and its warps and grid."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    from mhc_compile.lowering import post  # noqa: F401  # registers the op

    graph, nodes = fx.Graph(), []
    shapes = [((tokens, 4, width), torch.bfloat16), ((tokens, width), torch.bfloat16)]
    shapes += [((tokens, 4), torch.float32), ((tokens, 4, 4), torch.float32)]
    given = [torch.empty(shape, dtype=dtype, device="cpu") for shape, dtype in shapes]
    mode, fakes = fake_inputs([], given, {index: [0] for index in range(4)} if dynamic else {})
    with mode:
        for index, value in enumerate(fakes):
            nodes.append(graph.placeholder(f"a{index}"))
            nodes[-1].meta["val"] = value.to("cuda:0")
        call = graph.call_function(torch.ops.mhc_kernel.post.default, (*nodes, False))
        call.meta["val"] = torch.empty_like(nodes[0].meta["val"])
    graph.output(call)
    LaunchPass(log, options)(graph)
    assert not log.entries, "every call was opened"
    [launch] = [node for node in graph.nodes if "triton_kernel" in str(node.target)]
    kernel = kernel_side_table.get_kernel(int(launch.kwargs["kernel_idx"]))
    constants: dict[str, Any] = dict(launch.kwargs["kwargs"])
    return {"BC": constants["BC"], "num_warps": kernel.configs[0].num_warps, "grid": launch.kwargs["grid"][0][0]}


@needs_triton
def test_a_stored_choice_reaches_the_graph(
    monkeypatch: pytest.MonkeyPatch, another_process: Callable[[], None]
) -> None:
    monkeypatch.setattr(tune, "device_name", lambda device: GPU)

    def seconds(runner: Any, config: tune.Config) -> float:
        return 0.5 if config == SMALL else 1.0

    monkeypatch.setattr(tune._Runner, "__call__", seconds)
    log = LoweringLog()
    fixed = {"BC": 1024, "num_warps": 4, "grid": 4 * 8192}
    tuned = {"BC": 256, "num_warps": 1, "grid": 16 * 8192}
    assert lowered_post(Options(autotune=False), log) == fixed
    assert log.tuned == []
    assert lowered_post(Options(), log) == tuned
    assert [line.split(",")[0] for line in log.tuned] == ["post: BC=256 num_warps=1"]
    another_process()
    monkeypatch.setattr(tune._Runner, "__call__", None)
    again = LoweringLog()
    assert lowered_post(Options(), again) == tuned, "from disk: nothing is measured"
    assert lowered_post(Options(), again) == tuned
    assert len(again.tuned) == 1
    assert again.tuned[0].endswith("from disk")
    assert lowered_post(Options(autotune=False), log) == fixed
    assert lowered_post(Options(), log, tokens=8) == {"BC": 1024, "num_warps": 4, "grid": 32}, "too small to tell"


@needs_triton
def test_an_open_number_of_tokens_is_measured_at_its_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph stays open: the grid is a symbol's."""
    sizes: list[int] = []

    def seconds(runner: Any, config: tune.Config) -> float:
        with outside_of_tracing():
            assert type(torch.empty(1)) is torch.Tensor
        sizes.append(tune._bytes(runner.args))
        return 1.0 / config["BC"]

    monkeypatch.setattr(tune, "device_name", lambda device: GPU)
    monkeypatch.setattr(tune._Runner, "__call__", seconds)
    found = lowered_post(Options(), LoweringLog(), 2048, 2048, dynamic=True)
    assert found["BC"] == 2048
    assert not isinstance(found["grid"], int)
    assert set(sizes) == {2048 * 2048 * 2 * 9 + 2048 * 20 * 4}
    assert [key[1].split()[1] for key in tune._chosen] == ["T<=2048"]


@needs_triton
def test_no_device_no_choice() -> None:
    if not torch.cuda.is_available():
        assert lowered_post(Options(), LoweringLog())["BC"] == 1024


def test_the_key_of_compiled_graphs_knows_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    generation = [0]
    monkeypatch.setattr(tune, "identity", lambda: (("gpu", generation[0]),))

    def keys() -> list[Any]:
        return [LaunchPass(LoweringLog(), Options(autotune=on)).uuid() for on in (True, False)]

    before = keys()
    assert before[0] != before[1]
    generation[0] = 1
    after = keys()
    assert (after[0] != before[0], after[1] == before[1]) == (True, True)


def test_a_session_that_is_open_wins() -> None:
    """So that settings can be measured ahead of time, without the budget."""
    outer = tune.Session(budget=100.0)
    with tune.session(outer):
        assert LaunchPass(LoweringLog(), Options(autotune=False)).tuning is outer
    assert LaunchPass(LoweringLog()).tuning is None


def test_a_clock_decides_nothing_about_deterministic_runs() -> None:
    assert LaunchPass(LoweringLog(), Options()).tuning is not None
    torch.use_deterministic_algorithms(True)
    try:
        assert LaunchPass(LoweringLog(), Options()).tuning is None
    finally:
        torch.use_deterministic_algorithms(False)


@needs_triton
@pytest.mark.parametrize("width", [64, 96, 1280, 2560, 4096, 16384])
def test_candidates_are_few_and_fit(width: int) -> None:
    from mhc_compile.lowering import boundary, coefficients, post, pre, pre_norm

    tall = (8192, width, 2)
    project = (8192, 32, 4 * width, 2, 1)
    pairs = [
        (post.post_config(width), post.post_others(width)),
        (post.dots_config(width), post.dots_others(width)),
        (pre.dots_config(width), pre.dots_others(width)),
        (pre_norm.backward_config(width), pre_norm.backward_others(width)),
        (coefficients.project_config(*project), coefficients.project_others(*project)),
        (boundary.streams_config(*tall), boundary.streams_others(*tall)),
        (boundary.streams_config(8, width, 4), boundary.streams_others(8, width, 4)),
    ]
    for fixed, others in pairs:
        assert len([one for one in others if one != fixed]) <= 4
        assert all(set(one) == set(fixed) for one in others)
    for one in boundary.streams_others(*tall):
        assert one["BT"] % (16 * one["WARPS"]) == 0, "the tensor core's tile is 16 rows a warp"
        assert one["SPAN"] % one["BC"] == 0
    for one in coefficients.project_others(*project):
        assert one["SPAN"] % one["BK"] == 0


@needs_triton
@pytest.mark.timeout(900)
def test_every_setting_computes_the_same() -> None:
    """interpreted_settings.py in a process with Triton's interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command.append(str(ROOT / "tests" / "lowering" / "interpreted_settings.py"))
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


# ------------------------------------------------------------------------------------------------ on a device
if torch.cuda.is_available() and triton_version():
    from tests.lowering import interpreted_settings

    on_a_device = pytest.mark.gpu(interpreted_settings.test_every_setting)
    test_every_setting_on_a_device = pytest.mark.usefixtures("poisoned")(on_a_device)


HIT = """
import json, torch
from mhc_compile.lowering import tune
def run(runner, config):
    raise AssertionError("measured")
tune._Runner.__call__ = run
from mhc_compile.config import Options
from mhc_compile.lowering.base import LoweringLog
from tests.lowering.test_tune import lowered_post
log = LoweringLog()
print(json.dumps([lowered_post(Options(), log, 2048, 1280), log.tuned]))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not triton_version(), reason="needs Triton")
def test_on_a_device() -> None:
    """One kernel, a shape of some MiB: within the budget, the global random numbers untouched, the second process
    measures nothing."""
    state, before = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    log = LoweringLog()
    found = lowered_post(Options(), log, 2048, 1280)
    assert len(log.tuned) == 1, log.tuned
    [choice] = tune._chosen.values()
    assert choice.source == "measured", choice.line()
    assert choice.tried >= 2
    assert choice.seconds <= 1.5 * tune.BUDGET_S, "a compile cannot be broken off"
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert torch.cuda.memory_allocated() <= before
    command = [sys.executable, "-c", HIT]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=300).stdout
    there, lines = json.loads(out.splitlines()[-1])
    assert there == found
    assert lines[0].endswith("from disk")


@pytest.mark.gpu
@pytest.mark.skipif(not triton_version(), reason="needs Triton")
def test_no_measurement_while_a_graph_is_captured() -> None:
    log, graph = LoweringLog(), torch.cuda.CUDAGraph()
    x = torch.ones(8, device="cuda")
    with torch.cuda.graph(graph):
        x += 1
        assert lowered_post(Options(), log, 2048, 1280)["BC"] == 512
    graph.replay()
    assert "captured" in log.tuned[0]
    assert not tune.load(torch.cuda.get_device_name()).entries
