"""The zoo: tiny random models of many architectures, with the number of residual sites that each must give.

``published()`` is the fixed list that must convert (or be refused with its reason); ``styles()`` are plain PyTorch
models written for this project; ``entries()`` is both.
"""

from __future__ import annotations

from tests.zoo import audio, encoders, styles_models, text, vision
from tests.zoo.base import Entry, Example

__all__ = ["Entry", "Example", "entries", "get", "published", "styles"]


def published() -> list[Entry]:
    """Hugging Face architectures, one entry each."""
    return [*text.ENTRIES, *encoders.ENTRIES, *vision.ENTRIES, *audio.ENTRIES]


def styles() -> list[Entry]:
    """Plain PyTorch models, one for each way to write (or to read) a residual stream."""
    return list(styles_models.ENTRIES)


def entries() -> list[Entry]:
    """Every hand-written entry; names are unique."""
    return [*published(), *styles()]


def get(name: str) -> Entry:
    """The entry of that name; KeyError names the known ones."""
    table = {entry.name: entry for entry in entries()}
    if name not in table:
        raise KeyError(f"no entry {name!r} in the zoo; known: {sorted(table)}")
    return table[name]
