"""Encoder-only text models of the published list."""

from __future__ import annotations

from tests.zoo.base import Entry
from tests.zoo.hf import SMALL_TEXT, builder
from tests.zoo.text import TWO, two_a_layer

_NAMES = {k: v for k, v in SMALL_TEXT.items() if k != "num_key_value_heads"}

ENTRIES: list[Entry] = [
    Entry(
        "bert",
        "encoder",
        builder("bert", "AutoModelForMaskedLM", **_NAMES),
        two_a_layer,
        TWO,
        status="refused",
        reason="post-norm",
        options={"post_norm": "per_stream"},
        notes="LayerNorm(x + branch(x)): the norm sits on the carrier",
    ),
    Entry(
        "roberta-prelayernorm",
        "encoder",
        builder("roberta-prelayernorm", "AutoModelForMaskedLM", **_NAMES),
        two_a_layer,
        TWO,
        notes="the pre-norm BERT",
    ),
    Entry(
        "modernbert",
        "encoder",
        builder("modernbert", "AutoModelForMaskedLM", **_NAMES, cls_token_id=1, sep_token_id=2),
        two_a_layer,
        TWO,
        notes="the first layer has no attention norm",
    ),
]
