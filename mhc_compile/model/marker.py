"""A note in the model's config that its checkpoints hold hyper-connections.

Hugging Face's ``from_pretrained`` drops keys that the model class does not know with no more than a report; compiling
such a model would then start the parameters anew. The note is saved with the config and read when a model is
converted. Configs are shared between models of one process, so a note that was written in this process is told from
one that came out of a file by its type.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mhc_compile.config import Options

_FIELD = "mhc"


class LiveMarker(dict[str, Any]):
    """The note as written in this process; JSON makes a plain ``dict`` of it."""


def mark(root: nn.Module, options: Options) -> None:
    """Write the note into ``root.config`` if the model has a config that takes it."""
    config = getattr(root, "config", None)
    if config is None or not hasattr(config, "to_json_string") or isinstance(getattr(config, _FIELD, None), LiveMarker):
        return
    setattr(config, _FIELD, LiveMarker(streams=options.streams, variant=options.variant))


def is_from_checkpoint(root: nn.Module) -> bool:
    """True if the model's config was read from a file that a converted model had written."""
    note = getattr(getattr(root, "config", None), _FIELD, None)
    return isinstance(note, dict) and not isinstance(note, LiveMarker)


def unmark(root: nn.Module) -> None:
    """Take the note off again."""
    config = getattr(root, "config", None)
    if isinstance(getattr(config, _FIELD, None), dict):
        delattr(config, _FIELD)
