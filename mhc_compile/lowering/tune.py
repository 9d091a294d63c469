"""Which setting of a kernel is fastest on this device: a short list, measured once, kept on disk.

Every kernel has a fixed setting by shape and, beside it, a few others. On a shape that was never seen, each of them is
launched a few times on scratch tensors of that shape, the fixed one first, for at most ``BUDGET_S`` seconds with the
compile time in them; another setting is taken where it wins by ``MARGIN`` twice. The choice is kept, one JSON file a
device and version of torch, and read from there by every later process. Within a process a question has one answer,
whatever happens to the file.

Only settings are asked for whose bits nothing else has to repeat: element-wise kernels, and reductions that a backward
computes once. ``pre_norm`` is rebuilt by a recompute plan and by ``post_pre_norm``, and stays as it is.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import json
import logging
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhc_compile.compat import outside_of_tracing, size_hint, triton_version
from mhc_compile.cost import cache_file, keep_json

log = logging.getLogger("mhc_compile")

BUDGET_S = 2.0
"""Seconds that the settings of one kernel may take on a new shape, compile time included."""
MARGIN = 0.02
"""How much faster than the fixed setting another must be, in two measurements."""
LEAST_BYTES = 2**23
"""A kernel that touches less takes a microsecond or two: the clock of the device does not tell its settings apart."""
RUNS = 9
"""Launches of a setting, of which the median counts."""

Config = dict[str, int]


@dataclass(frozen=True)
class Choice:
    """The setting of one kernel for one shape, and where it comes from."""

    kernel: str
    config: Config
    gain: float = 0.0
    """Part of the fixed setting's time that it saves; 0 for the fixed setting itself."""
    seconds: float = 0.0
    """How long it took to find out."""
    tried: int = 0
    """Settings that were measured, the fixed one among them."""
    source: str = "measured"
    """`measured`, `disk`, or why the fixed setting stays unmeasured."""

    def line(self) -> str:
        """For the report."""
        setting = " ".join(f"{name}={value}" for name, value in self.config.items())
        if self.source not in ("measured", "disk"):
            return f"{self.kernel}: {setting}, fixed ({self.source})"
        gain = f"{self.gain:.1%} faster than the fixed setting" if self.gain > 0 else "the fixed setting"
        origin = "from disk" if self.source == "disk" else f"measured in {self.seconds:.1f} s"
        return f"{self.kernel}: {setting}, {gain}, best of {self.tried}, {origin}"


# ------------------------------------------------------------------------------------------------ on disk
@dataclass
class Table:
    """What is kept of a device."""

    generation: int = 0
    """Counts how often a choice was taken back or changed: compiled graphs that hold one are stale then."""
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)


def load(device: str) -> Table:
    """The choices kept for a device; empty where there are none or the file cannot be read."""
    try:
        data = json.loads(cache_file("tuning", device).read_text(encoding="utf-8"))
        entries = {key: entry for key, entry in data["entries"].items() if _sound(entry)}
        return Table(int(data["generation"]), entries)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return Table()


def _sound(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("config"), dict):
        return False
    numbers = (entry.get("gain"), entry.get("seconds"), entry.get("tried"))
    return all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)


def _save(device: str, table: Table) -> Path | None:
    return keep_json(cache_file("tuning", device), asdict(table), sort_keys=True)


def keep(device: str, key: str, choice: Choice, offered: Sequence[Config], again: bool = False) -> Choice:
    """Add a choice to what the file holds by now. What another process has found among the same settings in the
    meantime is taken instead, so that all agree; with `again` it is replaced. A directory that cannot be written to is
    no error."""
    table = load(device)
    there = table.entries.get(key)
    if there is not None and there["config"] in offered and not again:
        return _from_entry(choice.kernel, there)
    entry = {"config": choice.config, "gain": choice.gain, "seconds": choice.seconds, "tried": choice.tried}
    changed = there is not None and there["config"] != choice.config
    _save(device, Table(table.generation + changed, {**table.entries, key: entry}))
    return choice


def _from_entry(kernel: str, entry: dict[str, Any]) -> Choice:
    return Choice(kernel, dict(entry["config"]), entry["gain"], entry["seconds"], entry["tried"], "disk")


def clear(device: str) -> int:
    """Forget the choices kept for a device; returns how many there were."""
    table = load(device)
    if table.entries:
        _save(device, Table(table.generation + 1))
    return len(table.entries)


def kept(device: str) -> list[str]:
    """The choices kept for a device, two lines each: the question, then the answer."""
    entries = sorted(load(device).entries.items())
    return [f"{key}\n  {_from_entry(key.split()[0], entry).line()}" for key, entry in entries]


def identity() -> tuple[tuple[str, int], ...]:
    """For inductor's caches: a graph compiled with a choice is stale once that choice is changed or cleared, and not
    when others are added. Asks no device that this process has not used yet."""
    if not torch.cuda.is_initialized():
        return ()
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return tuple((name, load(name).generation) for name in sorted(names))


# ------------------------------------------------------------------------------------------------ the rule
_chosen: dict[tuple[str, str], Choice] = {}
_lock = threading.RLock()  # two kernels measured at once would slow each other down
_clock = time.perf_counter


def choose(
    kernel: str,
    key: str,
    default: Config,
    candidates: Sequence[Config],
    run: Callable[[Config], float],
    device: str,
    budget: float = BUDGET_S,
    again: bool = False,
) -> Choice:
    """The setting of `kernel` for the question `key` on a device, by the first of: what this process has answered
    before, what the device's file says (not with `again`), a measurement.

    Args:
        run: launches the kernel with a setting a few times and returns the seconds of one launch; raises what the
            compiler or the device raises. Called for nothing but a measurement.
        budget: seconds after which no further setting is begun.
    """
    offered = [default, *(one for one in candidates if one != default)]
    with _lock:
        found = _chosen.get((device, key))
        if found is None and not again:
            entry = load(device).entries.get(key)
            if entry is not None and entry["config"] in offered:
                found = _from_entry(kernel, entry)
        if found is None:
            found = _measured(kernel, offered, run, budget)
            if found.source == "measured":
                found = keep(device, key, found, offered, again)
        _chosen[device, key] = found
        return found


def _measured(kernel: str, offered: Sequence[Config], run: Callable[[Config], float], budget: float) -> Choice:
    """Measure the settings in order, the fixed one first, until one like the slowest so far would end too late."""
    start, slowest, default = _clock(), 0.0, offered[0]
    times: list[tuple[float, Config]] = []
    try:
        for config in offered:
            begun = _clock()
            if times and begun - start + slowest > budget:
                break
            try:
                times.append((run(config), config))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a setting may not fit the chip; without the fixed one there is no scale
                if not times:
                    return Choice(kernel, default, source=f"{type(error).__name__}: {str(error)[:120]}")
                log.debug("%s %s: %s", kernel, config, error)
            slowest = max(slowest, _clock() - begun)
        seconds, best = min(times, key=lambda item: item[0])
        gain = 1.0 - seconds / times[0][0]
        if best != default and gain >= MARGIN:
            # The least of several noisy times is too small: what counts is a second look, on the same terms.
            gain = min(gain, 1.0 - run(best) / run(default))
    except torch.OutOfMemoryError:
        return Choice(kernel, default, source="not enough free memory to measure")
    if best == default or gain < MARGIN:
        best, gain = default, 0.0
    return Choice(kernel, best, round(gain, 4), round(_clock() - start, 3), len(times))


# ------------------------------------------------------------------------------------------------ when it is asked
@dataclass(frozen=True)
class Session:
    """That settings may be chosen, how, and who is told."""

    report: Callable[[str], None] | None = None
    budget: float = BUDGET_S
    again: bool = False
    """Measure anew and replace what is kept."""


_session: contextvars.ContextVar[Session | None] = contextvars.ContextVar("mhc_tuning", default=None)


def current() -> Session | None:
    """The session that is open here, None outside of one: then every kernel has its fixed setting."""
    return _session.get()


@contextlib.contextmanager
def session(given: Session | None) -> Iterator[None]:
    """Open a session (None: close whatever is open) for the launches within."""
    token = _session.set(given)
    try:
        yield
    finally:
        _session.reset(token)


def setting(
    kernel: Any,
    args: Sequence[Any],
    constants: dict[str, Any],
    default: Config,
    candidates: Callable[[], Sequence[Config]],
    start: Callable[[int, Sequence[Any], Config], None],
) -> Config:
    """The setting of a launch: `default`, or within a session what `choose` says for these arguments.

    Args:
        args: what the kernel takes at run time, real or fake; the first a tensor [T, ...].
        start: launches the kernel for T tokens on real arguments with a setting.
    """
    now, first = _session.get(), args[0]
    if now is None or first.device.type != "cuda":
        return default
    device = device_name(first.device)
    if not device or _bytes(args) < LEAST_BYTES:
        return default
    others = candidates()
    name = str(kernel.fn.__name__).removesuffix("_kernel")
    key = question(name, kernel.cache_key, args, constants, [default, *others])
    choice = choose(name, key, default, others, _Runner(args, start), device, now.budget, now.again)
    if now.report is not None:
        now.report(choice.line())
    return choice.config


def device_name(device: torch.device) -> str:
    """The device's name, empty where there is none to ask (a graph for a GPU may be lowered without one)."""
    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""


def question(name: str, source: str, args: Sequence[Any], constants: dict[str, Any], configs: Sequence[Config]) -> str:
    """What a choice depends on, as text: kernel, tokens up to a power of two, dtypes, constants (n, C and flags among
    them), and by hash the kernel's source, Triton and the settings to choose from."""
    tokens = size_hint(args[0].shape[0])
    dtypes = ",".join(str(value.dtype).removeprefix("torch.") for value in args if isinstance(value, Tensor))
    flags = ",".join(f"{key}={value}" for key, value in sorted(constants.items()))
    made_of = json.dumps([source, triton_version(), list(configs)])
    bucket = 1 << max(tokens - 1, 0).bit_length()
    return f"{name} T<={bucket} {dtypes} {flags} {hashlib.sha256(made_of.encode()).hexdigest()[:16]}"


def _distinct(args: Sequence[Any]) -> list[Tensor]:
    return list({id(value): value for value in args if isinstance(value, Tensor)}.values())


def _elements(value: Tensor) -> int:
    return math.prod(size_hint(size) for size in value.shape)


def _bytes(args: Sequence[Any]) -> int:
    return sum(_elements(value) * value.element_size() for value in _distinct(args))


class _Runner:
    """Measures one setting after another on scratch tensors that look like the arguments of a launch."""

    def __init__(self, args: Sequence[Any], start: Callable[[int, Sequence[Any], Config], None]) -> None:
        self.args, self.start = args, start
        self.scratch: list[Any] | None = None
        self.flush: Tensor | None = None

    def __call__(self, config: Config) -> float:
        """Median seconds of a launch, L2 emptied before each. Raises OutOfMemoryError, and what a launch raises."""
        device = self.args[0].device
        with outside_of_tracing(), torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("a CUDA graph is being captured")
            if self.scratch is None or self.flush is None:
                self.scratch, self.flush = self._make(device)
            tokens, scratch = size_hint(self.args[0].shape[0]), self.scratch
            return seconds(lambda: self.start(tokens, scratch, config), self.flush)

    def _make(self, device: torch.device) -> tuple[list[Any], Tensor]:
        flush = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 2**28)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if torch.cuda.mem_get_info(device)[0] + unused < 1.25 * (_bytes(self.args) + flush):
            raise torch.OutOfMemoryError("scratch tensors would not fit")
        own = torch.Generator(device).manual_seed(0)  # the user's random numbers stay what they would have been
        made: dict[int, Tensor] = {}
        for value in _distinct(self.args):
            like = torch.empty([size_hint(size) for size in value.shape], dtype=value.dtype, device=device)
            made[id(value)] = like.uniform_(-1.0, 1.0, generator=own) if like.is_floating_point() else like.zero_()
        scratch = [made[id(one)] if isinstance(one, Tensor) else _number(one) for one in self.args]
        return scratch, torch.empty(flush, dtype=torch.int8, device=device)


def _number(value: Any) -> Any:
    return size_hint(value) if isinstance(value, torch.SymInt) else value


def seconds(call: Callable[[], None], flush: Tensor) -> float:
    """Median seconds of a call on the current CUDA stream; writing `flush` before each empties the L2 and gives the
    host time to launch ahead."""
    call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(RUNS)]
    for begin, end in events:
        flush.zero_()
        begin.record()
        call()
        end.record()
    events[-1][1].synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


__all__ = ["Choice", "Session", "Table", "choose", "clear", "current", "identity", "kept", "load", "session"]
