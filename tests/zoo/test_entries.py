"""Each hand-written entry of the zoo stands on its own feet: finite loss, same bits again.

Captured in the number of graphs it says.
"""

from __future__ import annotations

import pytest

from tests.zoo import Entry, entries, get, published, styles
from tests.zoo.check import facts

PUBLISHED = [
    "llama",
    "qwen3",
    "qwen3-moe",
    "mixtral",
    "gemma3",
    "phi3",
    "gpt2",
    "gpt-neox",
    "gptj",
    "falcon",
    "opt",
    "bloom",
    "cohere2",
    "granite",
    "deepseek-v3",
    "t5",
    "bart",
    "whisper-encoder",
    "bert",
    "vit",
    "dinov2",
    "clip",
    "swin",
    "mamba2",
]


def test_names_are_unique_and_the_published_list_is_complete() -> None:
    names = [entry.name for entry in entries()]
    assert len(names) == len(set(names))
    assert set(PUBLISHED) <= {entry.name for entry in published()}
    assert "nn-transformer-encoder" in {entry.name for entry in styles()}


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match="llama"):
        get("lama")


@pytest.mark.slow  # the same models go through the backend in tests/test_architectures.py
@pytest.mark.zoo
@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_entry_runs_repeats_and_is_captured(entry: Entry) -> None:
    row = facts(entry)
    assert not row["error"], row.get("traceback", row["error"])
    assert row["graphs"] == entry.graphs
    assert (entry.status == "refused") == bool(entry.reason)
    assert row["sites"] > 0 or entry.status == "refused"
