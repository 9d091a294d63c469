"""Options of the backend: one frozen dataclass, and who set each field.

A value comes from the first of these that gives one, and ``Resolved.set_by`` says which it was:

1. the environment: ``MHC_COMPILE_<FIELD>=value`` (``env:MHC_COMPILE_STREAMS``)
2. ``options={...}`` or an ``Options`` object (``options``)
3. ``options={"preset": name}`` (``preset:name``)
4. ``torch.compile(mode=name)`` or ``options={"mode": name}`` with the name of a preset (``mode:name``)
5. the default (``default``)

``mode`` also takes the names of torch (``reduce-overhead``, ``max-autotune``, ...): they are inductor settings and end
up in ``Resolved.inductor``, together with ``options={"inductor": {...}}``, which is passed on as it is.
``dynamic`` and ``fullgraph`` are arguments of ``torch.compile`` and never reach a backend.
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from mhc_compile.errors import OptionError

__all__ = ["ENVIRONMENT_PREFIX", "PRESETS", "Options", "Resolved", "options_table", "resolve"]

ENVIRONMENT_PREFIX = "MHC_COMPILE_"

# Variables with our prefix that are not options; any other unknown one is taken for a misspelt option.
ENVIRONMENT_OTHER = frozenset({"CACHE_DIR"})


# ------------------------------------------------------------------------------------------------ kinds of values
class Kind(Protocol):
    """What a field accepts: ``take`` normalises a value, ``read`` a text; both raise ValueError with a hint (or "")."""

    @property
    def legal(self) -> str:
        """The legal values in words, for messages and for the table."""

    def take(self, value: object) -> object: ...

    def read(self, text: str) -> object: ...


def _nearest(word: str, words: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` with the nearest of `words`, or nothing."""
    found = difflib.get_close_matches(word.lower(), list(words), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


def _whole(value: object) -> int:
    """`value` as an int; a bool is not a number here, a numpy integer is."""
    if isinstance(value, bool):
        raise ValueError
    try:
        return operator.index(value)  # type: ignore[arg-type]  # TypeError for what has no __index__ is the point
    except TypeError:
        raise ValueError from None


@dataclass(frozen=True)
class Choice:
    values: tuple[str | int, ...]

    @property
    def legal(self) -> str:
        return ", ".join(repr(value) for value in self.values)

    def take(self, value: object) -> object:
        if isinstance(self.values[0], int):
            value = _whole(value)
        if not isinstance(value, (str, int)) or value not in self.values:
            raise ValueError(_nearest(value, map(str, self.values)) if isinstance(value, str) else "")
        return value

    def read(self, text: str) -> object:
        return self.take(int(text) if isinstance(self.values[0], int) and text.isdecimal() else text)


@dataclass(frozen=True)
class Flag:
    legal: str = "True, False"

    def take(self, value: object) -> object:
        if not isinstance(value, bool):
            raise ValueError
        return value

    def read(self, text: str) -> object:
        word = text.lower()
        if word not in ("1", "true", "on", "yes", "0", "false", "off", "no"):
            raise ValueError(" In the environment: 1 or 0.")
        return word in ("1", "true", "on", "yes")


@dataclass(frozen=True)
class Count:
    low: int
    high: int

    @property
    def legal(self) -> str:
        return f"an integer from {self.low} to {self.high}"

    def take(self, value: object) -> object:
        number = _whole(value)
        if not self.low <= number <= self.high:
            raise ValueError
        return number

    def read(self, text: str) -> object:
        return self.take(int(text)) if text.isdecimal() else self.take(text)


@dataclass(frozen=True)
class Bytes:
    """A number of bytes, or a text with a unit, or one of `words`; None where there is no word."""

    words: tuple[str, ...] = ()

    @property
    def legal(self) -> str:
        first = ", ".join(repr(word) for word in self.words) or "None"
        return f"{first}, or a number of bytes (an integer, or a text such as '12GiB')"

    def take(self, value: object) -> object:
        if value is None and not self.words:
            return None
        if isinstance(value, str):
            return self.read(value)
        number = _whole(value)
        if number <= 0:
            raise ValueError
        return number

    def read(self, text: str) -> object:
        if text in self.words:
            return text
        if text == "None" and not self.words:
            return None
        size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
        if size is None:
            raise ValueError(_nearest(text, self.words))
        number, unit, binary = size.groups()
        scale = (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " ")
        return self.take(int(float(number) * scale))


@dataclass(frozen=True)
class Globs:
    legal: str = "module-name globs such as ('model.layers.*',)"

    def take(self, value: object) -> object:
        globs = (value,) if isinstance(value, str) else value
        if not isinstance(globs, (list, tuple, set, frozenset)):
            raise ValueError
        if not all(isinstance(glob, str) and glob for glob in globs):
            raise ValueError
        return tuple(sorted(globs) if isinstance(globs, (set, frozenset)) else globs)

    def read(self, text: str) -> object:
        return self.take([glob.strip() for glob in text.split(",") if glob.strip()])


FUSIONS = {
    "norm": "the norm that a branch begins with, into the op that reads the streams",
    "stream_gradient": "the sum of what a state gets through post, pre and coefficients",
    "site_boundary": "that sum with the dot products of the post before it",
    "ends": "the last post and collapse in one kernel; what all streams share there and in front, written once",
    "post_pre_norm": "post with the next site's pre and norm, where the gate is known before",
    "gate_pre_norm": "the gate into pre and norm, where Sinkhorn is elsewhere: on a side stream, or in post",
    "activate_post": "the post gate and Sinkhorn into post, where no backward reads them, up to 512 tokens",
    "activate_beside_norm": "gates and Sinkhorn into the launch of the norm, which does not wait for them",
    "few_tokens": "two launches a site for up to 64 tokens",
    "replay": "several sites of a recompute plan in one call, with what their branches read",
    "addends": "a sum of gradients into the kernel that reads it",
}
"""What the option `fuse` may name, in the order of the passes."""


@dataclass(frozen=True)
class Fusions:
    """All (True), none (False), or some of `FUSIONS` by name."""

    @property
    def legal(self) -> str:
        return f"True, False, or some of {', '.join(map(repr, FUSIONS))}"

    def take(self, value: object) -> object:
        if isinstance(value, bool):
            return value
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, (list, tuple, set, frozenset)) or not names:
            raise ValueError
        for name in names:
            if name not in FUSIONS:
                raise ValueError(_nearest(name, FUSIONS) if isinstance(name, str) else "")
        return True if set(names) == set(FUSIONS) else tuple(one for one in FUSIONS if one in names)

    def read(self, text: str) -> object:
        try:
            return Flag().read(text)
        except ValueError:
            return self.take([name.strip() for name in text.split(",") if name.strip()])


def _option(default: Any, kind: Kind, doc: str) -> Any:
    return field(default=default, metadata={"kind": kind, "doc": doc})


# ------------------------------------------------------------------------------------------------ the options
@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything that can be asked of the backend: immutable, comparable, hashable. Metadata holds the text of a field.

    Raises OptionError if a value is illegal or two of them contradict each other.
    """

    streams: int = _option(4, Choice((1, 2, 3, 4, 8)), "Width n of the residual state. 1 leaves the model as it was.")
    variant: str = _option(
        "mhc",
        Choice(("mhc", "single_pass", "identity", "hc")),
        "`mhc`: H_res projected by Sinkhorn-Knopp (the paper). `single_pass`: the pre-mix of a site comes from the "
        "site before it (DeepSeek V4.1). `identity`: H_res = I. `hc`: unconstrained hyper-connections.",
    )
    init: str = _option(
        "preserve",
        Choice(("preserve", "paper")),
        "`preserve`: the converted model computes what the plain one does until the first step (for a pretrained "
        "checkpoint). `paper`: the initialisation of the paper, for training from scratch.",
    )
    sinkhorn_iters: int = _option(
        20, Count(1, 1000), "Rounds of row and column normalisation; read by the variants `mhc` and `single_pass`."
    )
    collapse: str = _option(
        "mean",
        Choice(("mean", "sum", "learned")),
        "How the streams become one at the end of a chain. `sum` is refused with `init='preserve'`: n equal copies add "
        "up to n times the original.",
    )
    post_norm: str = _option(
        "leave",
        Choice(("leave", "per_stream")),
        "A model whose norm sits on the carrier (BERT): `leave` it alone, or apply the norm to every stream.",
    )
    include: tuple[str, ...] = _option(
        (), Globs(), "Only sites owned by modules whose name matches one of these globs are widened; empty means all."
    )
    exclude: tuple[str, ...] = _option(
        (), Globs(), "Sites owned by modules that match are left alone; wins over `include`."
    )
    rewrite: bool = _option(True, Flag(), "Find residual adds and widen them.")
    raise_patterns: bool = _option(True, Flag(), "Find hand-written hyper-connections and replace them by our ops.")
    fuse: bool | tuple[str, ...] = _option(
        True,
        Fusions(),
        "Fuse what neighbouring ops have in common into one kernel, and the norm that a branch begins with into the op "
        "that reads the streams. The names: " + "; ".join(f"`{name}`, {what}" for name, what in FUSIONS.items()) + ".",
    )
    recompute: str | int = _option(
        "off",
        Bytes(("off", "memory", "speed")),
        "`off`: keep every stream state for the backward. `memory`: least peak. `speed`: recompute only what does not "
        "fit `memory_budget`. A number: the bytes that the kept stream states may take.",
    )
    memory_budget: int | None = _option(
        None, Bytes(), "Bytes of device memory for `recompute='speed'`; None means what the device has free."
    )
    schedule: str = _option(
        "off",
        Choice(("off", "auto", "captured")),
        "`auto`: side work of the hyper-connections on a second stream of the GPU, where what was measured of the "
        "device (`python -m mhc_compile calibrate`) promises a gain; without a measurement one stream. `captured`: the "
        "same for a step that you capture in a CUDA graph yourself, where launches cost the host nothing.",
    )
    lowering: str = _option(
        "auto",
        Choice(("auto", "native", "triton", "mlir")),
        "`auto`: our Triton kernels where they apply. `native`: the PyTorch bodies, fused by inductor. `triton`: as "
        "`auto`, but an op without a kernel is an error. `mlir`: the whole graph through torch-mlir and IREE, for "
        "inference on the CPU.",
    )
    autotune: bool = _option(
        True,
        Flag(),
        "On a GPU, measure a few settings of each kernel on a shape that is new, for at most 2 s a kernel, and keep "
        "the fastest on disk. Off, on a CPU, or under `torch.use_deterministic_algorithms`: the fixed settings.",
    )
    compiler: str = _option(
        "inductor",
        Choice(("inductor", "aot_eager", "eager")),
        "What compiles the rewritten graph; the last two are for debugging.",
    )
    on_failure: str = _option(
        "raise",
        Choice(("raise", "warn")),
        "When a graph cannot be converted: `raise` the error, or `warn` and compile it as it is.",
    )
    verify: bool = _option(
        False, Flag(), "Run the rewritten graph beside the original once; raise if they differ by more than rounding."
    )

    def fuses(self, name: str) -> bool:
        """True if the fusion of `FUSIONS` is on."""
        return self.fuse if isinstance(self.fuse, bool) else name in self.fuse

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = _checked(item.name, getattr(self, item.name), text=False)
            object.__setattr__(self, item.name, value)  # frozen: the normalised value replaces the given one once, here
        problem = _contradiction(self)
        if problem:
            what, cure = problem
            raise OptionError(what, cure=cure)


def _contradiction(options: Options) -> tuple[str, str] | None:
    """The first pair of options that cannot both hold, with its cure; None if all is well."""
    if options.collapse == "sum" and options.init == "preserve" and options.streams > 1:
        n = options.streams
        what = f"collapse='sum' contradicts init='preserve': {n} equal streams add up to {n} times the original"
        return what, "collapse='mean', or init='paper' to train from scratch"
    if options.memory_budget is not None and options.recompute not in ("speed", "off"):
        what = f"memory_budget is read by recompute='speed' only, and recompute is {options.recompute!r}"
        return what, "recompute='speed', or leave memory_budget out"
    if options.fuses("site_boundary") and not options.fuses("stream_gradient"):
        return "fuse='site_boundary' takes up what 'stream_gradient' makes", "fuse=('stream_gradient', 'site_boundary')"
    if options.compiler != "inductor":
        if options.lowering in ("triton", "mlir"):
            what = f"lowering={options.lowering!r} contradicts compiler={options.compiler!r}"
            return what, "leave one of the two out"
        if options.schedule != "off":
            what = f"schedule={options.schedule!r} needs compiler='inductor', not {options.compiler!r}"
            return what, "leave one of the two out"
    both = sorted(set(options.include) & set(options.exclude))
    if both:
        return f"{both[0]!r} is both in include and in exclude", "take it out of one of them"
    return None


_FIELDS: dict[str, dataclasses.Field[Any]] = {item.name: item for item in dataclasses.fields(Options)}

# Keys of options={...} that are not fields: they are about where values come from.
_META_KEYS = ("preset", "mode", "inductor")


def _checked(name: str, value: Any, *, text: bool, where: str | None = None) -> Any:
    """`value` (or the text of an environment variable) normalised to the kind of field `name`; else OptionError."""
    kind: Kind = _FIELDS[name].metadata["kind"]
    try:
        return kind.read(value) if text else kind.take(value)
    except ValueError as error:
        what = f"option {name}={value!r} is not legal.{error}"
        raise OptionError(what, where=where, cure=f"{name} takes {kind.legal}") from None


# ------------------------------------------------------------------------------------------------ presets
PRESETS: dict[str, dict[str, Any]] = {
    # Training from scratch as in arXiv 2512.24880v2.
    "paper": {"streams": 4, "variant": "mhc", "init": "paper", "sinkhorn_iters": 20},
    # The V4.1 form: one traversal of the streams a site.
    "single_pass": {"streams": 4, "variant": "single_pass"},
    # The unconstrained ancestor (arXiv 2409.19606), for the stability comparison.
    "hc": {"streams": 4, "variant": "hc"},
    # A model that already has hyper-connections: make them fast, add none.
    "raise_only": {"rewrite": False, "raise_patterns": True},
    # Least peak memory.
    "memory": {"recompute": "memory"},
    # The rewrite alone, on the native bodies, compared with the original.
    "debug": {"verify": True, "fuse": False, "lowering": "native", "schedule": "off", "recompute": "off"},
}


# ------------------------------------------------------------------------------------------------ resolution
@dataclass(frozen=True)
class Resolved:
    """What was asked, what it came to, and who set it. ``asked`` is what the caller wrote, before validation."""

    options: Options
    asked: Mapping[str, Any]
    set_by: Mapping[str, str]
    inductor: Mapping[str, Any]

    def rows(self) -> list[tuple[str, Any, str]]:
        """(field, value, set by) for every field in declaration order: the options block of the report."""
        return [(name, getattr(self.options, name), self.set_by[name]) for name in _FIELDS]


def _unknown(key: object, *, where: str | None = None) -> OptionError:
    names = [*_FIELDS, *_META_KEYS]
    hint = _nearest(key, names) if isinstance(key, str) else ""
    return OptionError(f"unknown option {key!r}.{hint}", where=where, cure="the options are " + ", ".join(names))


def _preset(name: object) -> dict[str, Any]:
    if not isinstance(name, str) or name not in PRESETS:
        hint = _nearest(name, PRESETS) if isinstance(name, str) else ""
        raise OptionError(f"unknown preset {name!r}.{hint}", cure="the presets are " + ", ".join(PRESETS))
    return PRESETS[name]


def _inductor_mode(mode: str) -> dict[str, Any]:
    """Inductor's settings for one of torch's own mode names (imported late: inductor costs a second to import)."""
    import torch._inductor

    modes: dict[str, dict[str, Any]] = torch._inductor.list_mode_options()
    if mode not in modes:
        names = [*PRESETS, *modes]
        raise OptionError(f"unknown mode {mode!r}.{_nearest(mode, names)}", cure="the modes are " + ", ".join(names))
    return dict(modes[mode])


def resolve(
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Resolved:
    """Validate and merge every source of options; see the module's docstring for the order. Raises OptionError."""
    if isinstance(options, Options):
        # An object does not remember which fields were written, so those that differ from the default count as asked.
        given = {name: getattr(options, name) for name in _FIELDS}
        asked = {name: value for name, value in given.items() if value != _FIELDS[name].default}
    elif options is None or isinstance(options, Mapping):
        asked = dict(options or {})
    else:
        raise OptionError(f"options must be a dict or mhc_compile.Options, not {type(options).__name__}")
    for key in asked:
        if key not in _FIELDS and key not in _META_KEYS:
            raise _unknown(key)

    values: dict[str, Any] = {name: item.default for name, item in _FIELDS.items()}
    set_by: dict[str, str] = dict.fromkeys(_FIELDS, "default")
    inductor: dict[str, Any] = {}

    def put(source: Mapping[str, Any], who: str) -> None:
        values.update(source)
        set_by.update(dict.fromkeys(source, who))

    inner = asked.get("mode")
    if inner is not None and mode not in (None, "default") and inner != mode:
        raise OptionError(f"mode={mode!r} and options['mode']={inner!r} contradict each other", cure="give one of them")
    wanted = mode if mode not in (None, "default") else inner
    if wanted not in (None, "default"):
        if not isinstance(wanted, str):
            raise OptionError(f"mode must be a text, not {wanted!r}")
        if wanted in PRESETS:
            put(PRESETS[wanted], f"mode:{wanted}")
        else:
            inductor.update(_inductor_mode(wanted))
    if asked.get("preset") is not None:
        put(_preset(asked["preset"]), f"preset:{asked['preset']}")
    put({name: value for name, value in asked.items() if name in _FIELDS}, "options")

    extra = asked.get("inductor") or {}
    if not isinstance(extra, Mapping):
        raise OptionError(f"options['inductor'] must be a dict of inductor settings, not {type(extra).__name__}")
    inductor.update(extra)

    for variable, text in sorted(environ.items()):
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        name = variable[len(ENVIRONMENT_PREFIX) :].lower()
        if name.upper() in ENVIRONMENT_OTHER:
            continue
        if name not in _FIELDS:
            raise _unknown(name, where=f"environment variable {variable}")
        put({name: _checked(name, text, text=True, where=f"environment variable {variable}")}, f"env:{variable}")

    resolved = Options(**values)
    if inductor and (resolved.compiler != "inductor" or resolved.lowering == "mlir"):
        instead = "lowering='mlir'" if resolved.compiler == "inductor" else f"compiler={resolved.compiler!r}"
        raise OptionError(
            f"inductor settings ({', '.join(sorted(inductor))}) have no meaning with {instead}",
            cure="compiler='inductor', or leave the mode and options['inductor'] out",
        )
    if mode is not None:
        asked["mode"] = mode
    return Resolved(resolved, asked, set_by, inductor)


# ------------------------------------------------------------------------------------------------ documentation
def options_table() -> str:
    """The options as a Markdown table, for the README; a test keeps the two equal."""
    lines = ["| option | default | values | meaning |", "|---|---|---|---|"]
    for name, item in _FIELDS.items():
        kind: Kind = item.metadata["kind"]
        lines.append(f"| `{name}` | `{item.default!r}` | {kind.legal} | {item.metadata['doc']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(options_table())
