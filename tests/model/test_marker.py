"""The note in a Hugging Face config: hyper-connections that from_pretrained dropped are not trained anew in silence."""

from __future__ import annotations

import copy
import gc
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import mhc_compile
from mhc_compile.errors import CheckpointError
from mhc_compile.model import hyper_connections, marker
from tests.tiny import compiled

IDS = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))


def llama(config: transformers.LlamaConfig | None = None) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = config or transformers.LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def test_save_and_from_pretrained(tmp_path: Path) -> None:
    model = llama()
    call = compiled(model)
    call(input_ids=IDS)
    with torch.no_grad():
        for _, hc in hyper_connections(model):
            hc.bias.add_(torch.randn_like(hc.bias))
    want = call(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    note = json.loads((tmp_path / "config.json").read_text())["mhc"]
    assert (note["streams"], note["variant"]) == (4, "mhc")

    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert not any(hyper_connections(loaded))
    torch._dynamo.reset()
    with pytest.raises(CheckpointError, match=r"load_state_dict") as error:
        compiled(loaded)(input_ids=IDS)
    assert "from_pretrained dropped them" in error.value.what
    with pytest.raises(CheckpointError):
        mhc_compile.prepare(loaded, {"input_ids": IDS})
    assert not any(hyper_connections(loaded))

    mhc_compile.load_state_dict(loaded, load_file(tmp_path / "model.safetensors"))  # the cure
    torch._dynamo.reset()
    assert torch.equal(compiled(loaded)(input_ids=IDS).logits, want)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_deleting_the_note_starts_anew(tmp_path: Path) -> None:
    model = llama()
    mhc_compile.prepare(model, {"input_ids": IDS})
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    del loaded.config.mhc
    mhc_compile.prepare(loaded, {"input_ids": IDS})
    assert any(hyper_connections(loaded))


@pytest.mark.parametrize("share", [lambda c: c, copy.deepcopy, lambda c: type(c).from_dict(c.to_dict())])
def test_a_config_shared_in_one_process_is_no_alarm(share: object) -> None:
    first = llama()
    mhc_compile.prepare(first, {"input_ids": IDS})
    second = llama(share(first.config))  # type: ignore[operator]  # a function of this list
    mhc_compile.prepare(second, {"input_ids": IDS})
    assert len(list(hyper_connections(second))) == len(list(hyper_connections(first))) == 2


def test_to_plain_takes_the_note_off(tmp_path: Path) -> None:
    model = llama()
    mhc_compile.prepare(model, {"input_ids": IDS})
    mhc_compile.to_plain(model)
    model.save_pretrained(tmp_path)
    assert "mhc" not in json.loads((tmp_path / "config.json").read_text())
    mhc_compile.prepare(transformers.LlamaForCausalLM.from_pretrained(tmp_path), {"input_ids": IDS})


def test_to_plain_of_one_leaves_the_note_of_another(tmp_path: Path) -> None:
    """Models made from one config object share it; the note goes with the last of them that is converted."""
    first, other = llama(), nn.Module()
    second = llama(first.config)
    assert second.config is first.config
    for model in (first, second):
        mhc_compile.prepare(model, {"input_ids": IDS})
    other.config = first.config  # shares the config, was never converted
    mhc_compile.to_plain(first)
    second.save_pretrained(tmp_path)
    assert "mhc" in json.loads((tmp_path / "config.json").read_text())
    mhc_compile.prepare(first, {"input_ids": IDS})  # no alarm: the note is not from a file
    mhc_compile.to_plain(first)
    mhc_compile.to_plain(second)
    assert not hasattr(first.config, "mhc")


def test_the_note_does_not_keep_a_model_alive() -> None:
    first = llama()
    second = llama(first.config)
    for model in (first, second):
        mhc_compile.prepare(model, {"input_ids": IDS})
    del model, first
    torch._dynamo.reset()
    gc.collect()
    mhc_compile.to_plain(second)
    assert not hasattr(second.config, "mhc")


def test_models_without_such_a_config() -> None:
    """Anything may be called ``config``."""
    model = nn.Linear(2, 2)
    for config in (None, {"mhc": 1}, "text", 3):
        model.config = config
        marker.mark(model, 4, "mhc")
        assert model.config == config
        assert not marker.is_from_checkpoint(model)
        marker.unmark(model)
