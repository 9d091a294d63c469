"""Options: what is accepted, what is refused and how, and who set each field."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from mhc_compile import config
from mhc_compile.config import FUSIONS, PRESETS, Options, Resolved, resolve
from mhc_compile.errors import OptionError


def clean(options: Any = None, mode: str | None = None, **environ: str) -> Resolved:
    return resolve(options, mode, environ={"PATH": "/bin", **environ})


# ------------------------------------------------------------------------------------------------ the dataclass
def test_frozen_comparable_hashable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().streams = 2  # type: ignore[misc]  # that it is refused is the test
    assert Options(streams=2) == Options(streams=2) != Options()
    assert len({Options(), Options(), Options(variant="hc")}) == 2


def test_lists_of_globs_are_frozen() -> None:
    options = Options(include=["a.*"], exclude="b.*")  # type: ignore[arg-type]  # what a dict of options holds
    assert options.include == ("a.*",)
    assert options.exclude == ("b.*",)
    assert hash(options) == hash(Options(include=("a.*",), exclude=("b.*",)))
    # The order in a set is arbitrary, and two equal sets must give equal options.
    assert Options(include={"b", "a"}).include == ("a", "b")  # type: ignore[arg-type]  # as above


def test_index_types_are_taken_as_numbers() -> None:
    assert Options(streams=torch.tensor(2)).streams == 2  # type: ignore[arg-type]  # anything with __index__
    assert type(Options(streams=torch.tensor(2)).streams) is int  # type: ignore[arg-type]  # as above


@pytest.mark.parametrize(
    ("value", "size"), [(1, 1), ("8GiB", 8 << 30), ("1.5 GB", 1_500_000_000), ("512", 512), ("2mib", 2 << 20)]
)
def test_sizes(value: str | int, size: int) -> None:
    assert Options(recompute=value).recompute == size
    assert Options(recompute="speed", memory_budget=value).memory_budget == size  # type: ignore[arg-type]  # a text too


@pytest.mark.parametrize(
    ("options", "needles"),
    [
        ({"steams": 2}, ["unknown option 'steams'", "Did you mean 'streams'?", "sinkhorn_iters"]),
        ({3: 2}, ["unknown option 3"]),
        ({"streams": 5}, ["streams=5", "1, 2, 3, 4, 8"]),
        ({"streams": True}, ["streams=True"]),
        ({"streams": "4"}, ["streams='4'"]),
        ({"variant": "singlepass"}, ["Did you mean 'single_pass'?", "'identity'"]),
        ({"variant": None}, ["variant=None"]),
        ({"init": "papre"}, ["Did you mean 'paper'?"]),
        ({"sinkhorn_iters": 0}, ["from 1 to 1000"]),
        ({"sinkhorn_iters": 2.0}, ["sinkhorn_iters=2.0"]),
        ({"rewrite": 1}, ["True, False"]),
        ({"recompute": "memroy"}, ["Did you mean 'memory'?", "number of bytes"]),
        ({"recompute": -1}, ["recompute=-1"]),
        ({"recompute": True}, ["recompute=True"]),
        ({"memory_budget": "much"}, ["memory_budget='much'"]),
        ({"include": [1]}, ["globs"]),
        ({"include": 3}, ["globs"]),
        ({"lowering": "cuda"}, ["'native'"]),
        ({"preset": "papr"}, ["Did you mean 'paper'?", "raise_only"]),
        ({"inductor": ["x"]}, ["must be a dict"]),
        ({"mode": 3}, ["mode must be a text"]),
    ],
)
def test_refused_with_the_nearest_name_and_the_legal_values(options: dict[Any, Any], needles: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        clean(options)
    for needle in needles:
        assert needle in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"collapse": "sum"},
        {"recompute": "memory", "memory_budget": 1},
        {"recompute": 5, "memory_budget": 1},
        {"compiler": "eager", "lowering": "triton"},
        {"compiler": "aot_eager", "schedule": "auto"},
        {"compiler": "aot_eager", "schedule": "captured"},
        {"include": ["a"], "exclude": ["b", "a"]},
        {"compiler": "eager", "inductor": {"max_autotune": True}},
        {"compiler": "eager", "mode": "max-autotune"},
    ],
)
def test_contradictions_are_refused_with_a_cure(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        clean(options)
    assert caught.value.cure


@pytest.mark.parametrize(
    "options", [{"collapse": "sum", "init": "paper"}, {"collapse": "sum", "streams": 1}, {"memory_budget": 1}]
)
def test_what_only_looks_contradictory(options: dict[str, Any]) -> None:
    clean(options)


def test_not_a_dict() -> None:
    with pytest.raises(OptionError, match="must be a dict"):
        clean([("streams", 2)])


# ------------------------------------------------------------------------------------------------ who set it
def test_defaults() -> None:
    resolved = clean()
    assert resolved.options == Options()
    assert set(resolved.set_by.values()) == {"default"}
    assert (resolved.asked, resolved.inductor) == ({}, {})


def test_precedence() -> None:
    resolved = clean({"preset": "single_pass", "streams": 2}, "paper", MHC_COMPILE_SINKHORN_ITERS="7")
    assert resolved.options == Options(streams=2, variant="single_pass", init="paper", sinkhorn_iters=7)
    assert resolved.set_by["streams"] == "options"
    assert resolved.set_by["variant"] == "preset:single_pass"
    assert resolved.set_by["init"] == "mode:paper"
    assert resolved.set_by["sinkhorn_iters"] == "env:MHC_COMPILE_SINKHORN_ITERS"
    assert resolved.set_by["collapse"] == "default"
    assert resolved.asked == {"preset": "single_pass", "streams": 2, "mode": "paper"}
    assert ("streams", 2, "options") in resolved.rows()
    assert [name for name, _, _ in resolved.rows()] == [item.name for item in dataclasses.fields(Options)]


def test_an_options_object() -> None:
    resolved = clean(Options(streams=2), MHC_COMPILE_VARIANT="hc")
    assert resolved.options == Options(streams=2, variant="hc")
    assert resolved.asked == {"streams": 2}
    assert (resolved.set_by["streams"], resolved.set_by["init"]) == ("options", "default")


def test_the_callers_dict_is_not_changed() -> None:
    options = {"streams": 2, "inductor": {"max_autotune": False}}
    resolved = clean(options, "max-autotune")
    assert options == {"streams": 2, "inductor": {"max_autotune": False}}
    assert resolved.asked is not options


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_by_both_ways(name: str) -> None:
    assert clean({"preset": name}).options == clean(None, name).options == clean({"mode": name}).options
    for field, value in PRESETS[name].items():
        assert getattr(clean(None, name).options, field) == value


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_torch_modes_go_to_inductor(mode: str) -> None:
    resolved = clean(None, mode)
    assert resolved.options == Options()
    assert resolved.inductor == torch._inductor.list_mode_options(mode)
    assert clean({"mode": mode}).inductor == resolved.inductor


def test_inductor_settings_pass_through_and_win_over_the_mode() -> None:
    resolved = clean({"inductor": {"max_autotune": False, "x.y": 1}}, "max-autotune-no-cudagraphs")
    assert resolved.inductor == {"max_autotune": False, "coordinate_descent_tuning": True, "x.y": 1}


def test_fusions_by_name() -> None:
    some = Options(fuse=["addends", "norm", "norm"])  # type: ignore[arg-type]  # normalised
    assert some.fuse == ("norm", "addends"), "in the order of the passes, each once"
    assert some.fuses("norm")
    assert not some.fuses("replay")
    assert Options(fuse=tuple(FUSIONS)).fuse is True
    assert Options(fuse=tuple(FUSIONS)) == Options()
    assert all(Options().fuses(name) for name in FUSIONS)
    assert not any(Options(fuse=False).fuses(name) for name in FUSIONS)
    with pytest.raises(OptionError, match="Did you mean 'site_boundary'"):
        Options(fuse=("site_boundry",))
    with pytest.raises(OptionError, match="not legal"):
        Options(fuse=())
    with pytest.raises(OptionError, match="takes up what 'stream_gradient' makes"):
        Options(fuse=("site_boundary",))


def test_unknown_or_contradicting_mode() -> None:
    with pytest.raises(OptionError, match="Did you mean 'max-autotune'"):
        clean(None, "max-autotun")
    with pytest.raises(OptionError, match="contradict"):
        clean({"mode": "paper"}, "hc")
    assert clean({"mode": "paper"}, "default").set_by["init"] == "mode:paper"


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("STREAMS", "2", "streams", 2),
        ("VERIFY", "1", "verify", True),
        ("FUSE", "off", "fuse", False),
        ("FUSE", "replay, norm", "fuse", ("norm", "replay")),
        ("RECOMPUTE", "memory", "recompute", "memory"),
        ("RECOMPUTE", "1GiB", "recompute", 1 << 30),
        ("MEMORY_BUDGET", "None", "memory_budget", None),
        ("EXCLUDE", "a.*, b", "exclude", ("a.*", "b")),
        ("SINKHORN_ITERS", "3", "sinkhorn_iters", 3),
    ],
)
def test_environment(variable: str, text: str, field: str, value: object) -> None:
    resolved = clean({field: getattr(Options(), field)}, **{f"MHC_COMPILE_{variable}": text})
    assert getattr(resolved.options, field) == value
    assert resolved.set_by[field] == f"env:MHC_COMPILE_{variable}"


@pytest.mark.parametrize(
    ("variable", "text", "needle"),
    [
        ("MHC_COMPILE_STREMS", "2", "Did you mean 'streams'"),
        ("MHC_COMPILE_STREAMS", "5", "1, 2, 3, 4, 8"),
        ("MHC_COMPILE_STREAMS", "two", "1, 2, 3, 4, 8"),
        ("MHC_COMPILE_VERIFY", "maybe", "1 or 0"),
        ("MHC_COMPILE_SINKHORN_ITERS", "-1", "from 1 to 1000"),
    ],
)
def test_environment_is_refused_with_the_variable(variable: str, text: str, needle: str) -> None:
    with pytest.raises(OptionError) as caught:
        clean(**{variable: text})
    assert needle in str(caught.value)
    assert caught.value.where == f"environment variable {variable}"


def test_variables_that_are_not_options() -> None:
    assert clean(MHC_COMPILE_CACHE_DIR="/tmp/x", MHC_OTHER="1").options == Options()


def test_the_real_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHC_COMPILE_STREAMS", "8")
    assert resolve().options.streams == 8


# ------------------------------------------------------------------------------------------------ torch.compile
def test_torch_compile_hands_options_over() -> None:
    """What torch hands to a backend is what `resolve` takes, as a dict, as an object and as a mode."""
    seen: list[Resolved] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor], *, mode: Any = None, options: Any = None) -> Any:
        seen.append(resolve(options, mode, environ={}))
        return gm.forward

    for keywords in ({"options": {"streams": 2}}, {"options": Options(streams=2)}, {"mode": "paper"}, {}):
        torch._dynamo.reset()
        torch.compile(lambda x: x + 1, backend=backend, **keywords)(torch.ones(2))
    assert [each.options.streams for each in seen] == [2, 2, 4, 4]
    assert seen[0].options == seen[1].options
    assert seen[2].options.init == "paper"


# ------------------------------------------------------------------------------------------------ the README
def test_table_has_every_field() -> None:
    lines = config.options_table().splitlines()
    assert lines[0].startswith("| option | default |")
    assert [line.split("`")[1] for line in lines[2:]] == [item.name for item in dataclasses.fields(Options)]
    assert all(line.count("|") == 5 for line in lines)


def test_readme_holds_the_table() -> None:
    readme = Path(__file__).parent.parent / "README.md"
    if not readme.exists():
        pytest.skip("there is no README yet")
    assert config.options_table() in readme.read_text(encoding="utf-8"), "python -m mhc_compile.config prints it"
