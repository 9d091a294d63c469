"""``python -m mhc_compile explain <model>``: what the backend would do with a model. ``env``: what it runs on.
``mlir <model> -o out.mlir``: the converted model as MLIR. ``calibrate``: what the GPU does with two kernels at once,
for the option ``schedule`` (under torchrun beside communication too). ``tune``: which settings of the kernels are the
fastest, for ``autotune``.

A model is one of

* a Hugging Face configuration: a ``config.json``, a folder that holds one, or a model type (``llama``: its default
  configuration); built on the meta device where that works, so that its size does not matter. ``--set name=value``
  changes a field (``--set num_hidden_layers=2``).
* ``file.py:factory`` or ``package.module:factory``: called without arguments, returns the model, or the model and its
  example inputs.

Nothing is downloaded, and no model is compiled or run.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mhc_compile
from mhc_compile.config import ENVIRONMENT_PREFIX, resolve
from mhc_compile.errors import MhcError, MissingDependencyError, OptionError
from mhc_compile.lowering.mlir import OUTPUT_TYPES, WEIGHTS, to_mlir

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "networkx",
    "scipy",
    "rich",
    "safetensors",
    "torch-mlir",
    "iree-base-compiler",
    "numpy",
)


# ------------------------------------------------------------------------------------------------ the model
def _assignments(texts: Sequence[str], what: str) -> dict[str, Any]:
    """``name=value`` texts as a dict; a value that is a Python literal is read as one, anything else is a text."""
    answer: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise OptionError(f"{what} {text!r} is not name=value")
        try:
            answer[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            answer[name] = {"true": True, "false": False, "none": None}.get(value.lower(), value)
    return answer


def from_factory(place: str, function: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Call ``function`` of a file or of a module; raises OptionError if it is not there or gives no model."""
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise OptionError(f"there is no file {place}")
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert spec is not None  # a .py file always has one
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses and pickling look their module up there
        sys.path.insert(0, str(Path(place).resolve().parent))  # as python file.py would
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    if not callable(getattr(module, function, None)):
        raise OptionError(f"{place} has no function {function!r}")
    made = getattr(module, function)()
    model, inputs = made if isinstance(made, tuple) else (made, ())
    if not isinstance(model, nn.Module):
        raise OptionError(f"{place}:{function} returned {type(model).__name__}, not a torch.nn.Module")
    single = isinstance(inputs, (torch.Tensor, Mapping))
    return model, (inputs,) if single else tuple(inputs)


def from_config(name: str, changes: dict[str, Any]) -> nn.Module:
    """The model of a Hugging Face configuration, on the meta device if it can be built there."""
    try:
        import transformers
    except ImportError:
        raise MissingDependencyError(
            f"{name!r} is taken for a Hugging Face configuration, and transformers is not installed",
            cure="pip install 'mhc-compile[hf]', or name a factory: file.py:function",
        ) from None
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        fields = json.loads(path.read_text(encoding="utf-8"))
        kind = str(fields.pop("model_type", ""))
    else:
        fields, kind = {}, name.replace("-", "_")
    known = transformers.CONFIG_MAPPING
    if kind not in known and kind.replace("_", "-") in known:
        kind = kind.replace("_", "-")
    if kind not in known:
        raise OptionError(
            f"{name!r} is no configuration file, no folder with one, and {kind!r} is no model type of transformers",
            cure="give config.json, its folder, a model type such as llama, or file.py:function",
        )
    # A cache of keys and values is of no use to a training step, and on the meta device Dynamo cannot trace one.
    config = known[kind].from_dict({**fields, "use_cache": False, **changes})
    unknown = [field for field in changes if not hasattr(known[kind](), field)]
    if unknown:
        raise OptionError(f"the configuration {kind!r} has no field {unknown[0]!r}")
    kinds: list[Any] = [
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModelForSpeechSeq2Seq,
        transformers.AutoModel,
    ]
    if not getattr(config, "is_encoder_decoder", False):  # else it would be the decoder alone
        kinds.insert(0, transformers.AutoModelForCausalLM)
    for auto in kinds:
        if type(config) in auto._model_mapping:
            try:
                with torch.device("meta"):
                    model: nn.Module = auto.from_config(config)
            except (NotImplementedError, RuntimeError):  # a model that computes with values while it is built
                model = auto.from_config(config)
            return model.eval()
    raise OptionError(f"transformers builds no model from the configuration {kind!r} alone")


def example_inputs(model: nn.Module, batch: int, length: int) -> tuple[Any, ...]:
    """Inputs for a Hugging Face model by the name of its main input, on the device of its parameters.

    Token ids [batch, length] int64, pixels [batch, channels, size, size] or features [batch, bins, frames] float32.
    """
    config: Any = model.config
    device = next(model.parameters()).device
    name = str(getattr(model, "main_input_name", "input_ids"))
    ids = torch.zeros(batch, length, dtype=torch.int64, device=device)
    decoder = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    if name == "input_ids":
        return ({name: ids, **decoder},)
    inner = getattr(config, "vision_config", config)
    if name == "pixel_values":
        size = getattr(inner, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = getattr(inner, "num_channels", 3)
        return ({name: torch.zeros(batch, channels, height, width, device=device)},)
    if name == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", length)
        return ({name: torch.zeros(batch, config.num_mel_bins, frames, device=device), **decoder},)
    raise OptionError(
        f"what to feed {type(model).__name__} ({name}) is not known here", cure="name a factory: file.py:function"
    )


def load(arguments: argparse.Namespace) -> tuple[nn.Module, tuple[Any, ...]]:
    """The model that a command names, and its example inputs."""
    place, colon, function = arguments.model.rpartition(":")
    if colon and function.isidentifier() and place:
        model, inputs = from_factory(place, function)
        if not inputs:
            if not hasattr(model, "config"):
                raise OptionError("the factory gave no example inputs", cure="return (model, inputs)")
            inputs = example_inputs(model, arguments.batch, arguments.length)
    else:
        model = from_config(arguments.model, _assignments(arguments.set, "--set"))
        inputs = example_inputs(model, arguments.batch, arguments.length)
    return model, inputs


# ------------------------------------------------------------------------------------------------ the commands
def explain(arguments: argparse.Namespace) -> int:
    """``explain``: print the report; 1 if the model cannot be converted."""
    options = _assignments(arguments.option, "--option")
    resolve(options)  # a wrong option is said before the model is built
    model, inputs = load(arguments)
    report = mhc_compile.explain(model, *inputs, **options)
    if arguments.graph:
        print(report.graph)
    print(report.to_json() if arguments.json else str(report))
    return 1 if report.error else 0


def mlir(arguments: argparse.Namespace) -> int:
    """``mlir``: write the converted model as MLIR. Weights that exist are in it; those of a configuration are not."""
    options = _assignments(arguments.option, "--option")
    resolve(options)
    model, inputs = load(arguments)
    weights = arguments.weights
    if weights is None:
        weights = "external" if any(p.is_meta for p in model.parameters()) else "inline"
    dynamic: dict[int | str, int] = {
        int(name) if name.isdecimal() else name: int(axis)
        for name, axis in _assignments(arguments.dynamic, "--dynamic").items()
    }
    graph = mhc_compile.standalone(model.eval(), *inputs, dynamic=dynamic or None, **options)
    lowered = to_mlir(graph, *inputs, output_type=arguments.type, weights=weights)
    lowered.save(arguments.output)
    where = f"{len(lowered.weights)} weights as its first arguments" if lowered.weights else "its weights inside"
    print(f"{arguments.output}: {type(model).__name__} as {arguments.type}, {where}")
    return 0


def environment() -> dict[str, Any]:
    """Versions, devices and settings that decide how the backend behaves."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    entries = importlib.metadata.entry_points(group="torch_dynamo_backends")
    settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith(ENVIRONMENT_PREFIX)}
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    resolved = resolve(None)
    return {
        "mhc_compile": mhc_compile.__version__,
        "location": str(Path(mhc_compile.__file__).parent),
        "registered": any(entry.name == "mhc" for entry in entries),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "environment": settings,
        "options": {name: value for name, value, who in resolved.rows() if who != "default"},
    }


def env(arguments: argparse.Namespace) -> int:
    """``env``: print the environment."""
    facts = environment()
    if arguments.json:
        print(json.dumps(facts, indent=2, default=str))
        return 0
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{name}:" + ("" if value else " none"))
            for key, each in value.items():
                print(f"  {key:14} {each if each is not None else 'not installed'}")
        else:
            print(f"{name:16} {', '.join(value) or 'none' if isinstance(value, list) else value}")
    return 0


def calibrate(arguments: argparse.Namespace) -> int:
    """``calibrate``: measure pairs of kernels on the GPU and keep them in the cache directory; under torchrun beside
    communication too."""
    from mhc_compile.lowering.side import main_parts, side_cases
    from mhc_compile.scheduler import communication, contention

    if not torch.cuda.is_available():
        print("there is no CUDA device to calibrate", file=sys.stderr)
        return 1

    def sides(tokens: int, width: int) -> list[contention.Case]:
        return [contention.Case(*case) for case in side_cases(tokens, width)]

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:  # torchrun
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    found = contention.calibrate(
        sides, lambda tokens, width: [contention.Case(*case) for case in main_parts(tokens, width)]
    )
    if ranks > 1:
        torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
        found = communication.together(found, sides)
        rank = torch.distributed.get_rank()
        gc.collect()  # captured collectives go before what they run on
        torch.distributed.destroy_process_group()
        if rank:
            return 0
    print(contention.table(found))
    return 0


def tune(arguments: argparse.Namespace) -> int:
    """``tune``: measure the settings of the kernels ahead of time; ``--kept`` lists what is kept, ``--clear`` forgets
    it."""
    from mhc_compile.lowering import tune as settings
    from mhc_compile.lowering.tune_ahead import tune_ahead

    if not torch.cuda.is_available():
        print("there is no CUDA device to tune for", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name()
    if arguments.clear:
        print(f"{settings.clear(name)} settings for {name} forgotten")
    for width in arguments.width:
        print("\n".join(tune_ahead(arguments.tokens, width, arguments.streams)))
    if arguments.kept:
        print("\n".join(settings.kept(name)) or f"no settings for {name} are kept")
    return 0


def _model_arguments(parser: argparse.ArgumentParser, option: str) -> None:
    """What names a model, its inputs and the options; ``option`` is the short form of ``--option``."""
    parser.add_argument("model", help="config.json, a folder with one, a model type, or file.py:factory")
    parser.add_argument(
        option,
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the backend",
    )
    parser.add_argument(
        "-s", "--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the configuration"
    )
    parser.add_argument("--batch", type=int, default=1, help="rows of the example input (default: 1)")
    parser.add_argument("--length", type=int, default=64, help="tokens of the example input (default: 64)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mhc_compile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    first = commands.add_parser("explain", help="what the backend would do with a model")
    _model_arguments(first, "-o")
    first.add_argument("--json", action="store_true", help="the report as JSON")
    first.add_argument("--graph", action="store_true", help="the rewritten graph too")
    first.set_defaults(command=explain)
    second = commands.add_parser("env", help="versions, devices and settings")
    second.add_argument("--json", action="store_true", help="as JSON")
    second.set_defaults(command=env)
    fourth = commands.add_parser("calibrate", help="measure the GPU for schedule='auto', some 20 seconds")
    fourth.set_defaults(command=calibrate)
    fifth = commands.add_parser(
        "tune", help="measure the settings of the kernels for autotune, some ten seconds a width"
    )
    fifth.add_argument("--width", type=int, nargs="+", default=[], metavar="C", help="hidden sizes")
    fifth.add_argument("--tokens", type=int, default=8192, help="tokens of a step, batch times length (default: 8192)")
    fifth.add_argument("--streams", type=int, default=4, choices=(1, 2, 3, 4, 8), help="streams (default: 4)")
    fifth.add_argument("--kept", action="store_true", help="list the settings that are kept")
    fifth.add_argument("--clear", action="store_true", help="forget them first")
    fifth.set_defaults(command=tune)
    third = commands.add_parser("mlir", help="the converted model as MLIR")
    _model_arguments(third, "-O")
    third.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where the text goes")
    third.add_argument("-t", "--type", choices=OUTPUT_TYPES, default=OUTPUT_TYPES[0], help="dialect of the text")
    third.add_argument(
        "--weights", choices=WEIGHTS, help="constants, or arguments (default: constants if there are any)"
    )
    third.add_argument(
        "-d", "--dynamic", action="append", default=[], metavar="INPUT=AXIS", help="a size that may vary: input_ids=1"
    )
    third.set_defaults(command=mlir)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it worked, 1 if the model cannot be converted, 2 if the question was wrong."""
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.command(parsed))
    except MhcError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
