"""The command line: what it builds, what it prints, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mhc_compile import __main__ as command
from mhc_compile.errors import OptionError

FACTORY = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.line = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.line(self.norm(x))

def both():
    return nn.Sequential(Block(), Block()), torch.zeros(2, 3, 8)

def alone():
    return Block()

def nothing():
    return 3

def no_site():
    return nn.Linear(8, 8), (torch.zeros(2, 8),)
"""
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command puts the file's folder there
    monkeypatch.delitem(sys.modules, "made_here", raising=False)
    path = tmp_path / "made_here.py"
    path.write_text(FACTORY)
    return str(path)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return path


def test_a_factory_as_json(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["explain", f"{factory}:both", "--json", "-o", "streams=2", "-o", "variant=identity"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["sites"]) == 2
    assert (report["options"]["streams"], report["options"]["variant"]) == (2, "identity")


def test_a_factory_as_text_with_its_graph(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["explain", f"{factory}:both", "--graph"]) == 0
    out = capsys.readouterr().out
    assert "mhc.post" in out
    assert "2 sites" in out


def test_a_model_that_cannot_be_converted_is_exit_code_one(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["explain", f"{factory}:no_site"]) == 1
    assert "not converted" in capsys.readouterr().out


def test_a_configuration_and_a_changed_field(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert command.main(["explain", str(llama.parent), "-s", "num_hidden_layers=1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["sites"]) == 2


def test_a_configuration_is_built_without_memory(llama: Path) -> None:
    pytest.importorskip("transformers")
    model = command.from_config(str(llama), {})
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert [parameter.shape[0] for parameter in model.get_input_embeddings().parameters()] == [64]
    assert not model.config.use_cache


@pytest.mark.parametrize(
    ("kind", "fields", "shapes"),
    [
        ("t5", {"num_layers": 1, "d_model": 16}, {"input_ids": (2, 5), "decoder_input_ids": (2, 5)}),
        ("vit", {"image_size": 32, "num_hidden_layers": 1, "hidden_size": 24}, {"pixel_values": (2, 3, 32, 32)}),
        ("whisper", {"max_source_positions": 10, "num_mel_bins": 8, "d_model": 24}, {"input_features": (2, 8, 20)}),
    ],
)
def test_example_inputs(kind: str, fields: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
    pytest.importorskip("transformers")
    (inputs,) = command.example_inputs(command.from_config(kind, fields), batch=2, length=5)
    assert {name: tuple(value.shape) for name, value in inputs.items() if name in shapes} == shapes


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (["explain", "no/such.py:f"], "no file"),
        (["explain", "{factory}:missing"], "no function 'missing'"),
        (["explain", "{factory}:nothing"], "returned int"),
        (["explain", "{factory}:alone"], "no example inputs"),
        (["explain", "{factory}:both", "-o", "streams=5"], "1, 2, 3, 4, 8"),
        (["explain", "{factory}:both", "-o", "steams=2"], "Did you mean 'streams'"),
        (["explain", "{factory}:both", "-o", "streams"], "not name=value"),
        (["explain", "lama"], "no model type"),
        (["explain", "llama", "-s", "layers=2"], "no field 'layers'"),
    ],
)
def test_wrong_questions(arguments: list[str], needle: str, factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([argument.format(factory=factory) for argument in arguments]) == 2
    assert needle in capsys.readouterr().err


def test_inputs_that_are_not_known() -> None:
    model = torch.nn.Linear(2, 2)
    model.config = object()  # type: ignore[assignment]  # what Hugging Face puts there
    model.main_input_name = "point_clouds"  # type: ignore[assignment]  # as above
    with pytest.raises(OptionError, match="point_clouds"):
        command.example_inputs(model, 1, 1)


def test_environment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHC_COMPILE_STREAMS", "2")
    assert command.main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert facts["environment"] == {"MHC_COMPILE_STREAMS": "2"}
    assert facts["options"] == {"streams": 2}
    assert command.main(["env"]) == 0
    assert "MHC_COMPILE_STREAMS" in capsys.readouterr().out


def test_without_a_gpu_there_is_nothing_to_calibrate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["calibrate"]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_tune(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a GPU nothing; with one, what is kept is listed and forgotten."""
    from mhc_compile.lowering import tune, tune_ahead

    monkeypatch.setenv("MHC_COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["tune", "--kept"]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "gpu")
    monkeypatch.setattr(tune_ahead, "tune_ahead", lambda *sizes: [f"tuned for {sizes}"])
    tune.keep("gpu", "post T<=8", tune.Choice("post", {"BC": 512}, 0.1, 1.0, 4), [])
    assert command.main(["tune", "--kept", "--width", "64", "128", "--tokens", "32"]) == 0
    out = capsys.readouterr().out
    assert "tuned for (32, 64, 4)" in out
    assert "tuned for (32, 128, 4)" in out
    assert "post T<=8\n  post: BC=512, 10.0% faster" in out
    assert command.main(["tune", "--clear", "--kept"]) == 0
    assert capsys.readouterr().out.splitlines() == ["1 settings for gpu forgotten", "no settings for gpu are kept"]


def test_as_a_module() -> None:
    result = subprocess.run([sys.executable, "-m", "mhc_compile"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "command" in result.stderr


def test_mlir_of_a_factory(factory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch_mlir.fx", reason="needs torch-mlir")
    path = tmp_path / "out.mlir"
    asked = ["mlir", f"{factory}:both", "-o", str(path), "-O", "sinkhorn_iters=1", "-d", "0=1"]
    assert command.main(asked) == 0
    assert "its weights inside" in capsys.readouterr().out
    assert "@main(%arg0: tensor<2x?x8xf32>) -> tensor<2x?x8xf32>" in path.read_text()


def test_mlir_of_a_configuration_has_no_weights(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("torch_mlir.fx", reason="needs torch-mlir")
    path = tmp_path / "out.mlir"
    asked = ["mlir", str(llama), "-s", "num_hidden_layers=1", "-o", str(path), "-t", "torch", "--length", "4"]
    assert command.main([*asked, "-O", "sinkhorn_iters=1"]) == 0
    assert "weights as its first arguments" in capsys.readouterr().out
    text = path.read_text()
    assert text.startswith("// %arg0: model.embed_tokens.weight\n")
    assert "!torch.vtensor<[64,32],f32>" in text
