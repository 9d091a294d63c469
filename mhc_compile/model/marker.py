"""A note in the model's config that its checkpoints hold hyper-connections.

Hugging Face's ``from_pretrained`` drops keys that the model class does not know with no more than a report; compiling
such a model would then start the parameters anew. The note is saved with the config and read when a model is
converted. Configs are shared between models of one process, so a note that was written in this process is told from
one that came out of a file by its type, and stays as long as one of the models that share the config is converted.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from mhc_compile.model.hyper_connection import hyper_connections

_FIELD = "mhc"
_roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The models of this process in whose config the note was written."""


class LiveMarker(dict[str, Any]):
    """The note as written in this process; JSON makes a plain ``dict`` of it."""


def mark(root: nn.Module, streams: int, variant: str) -> None:
    """Write the note into ``root.config`` if the model has a config that takes it."""
    config = getattr(root, "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        return
    _roots.add(root)
    if not isinstance(getattr(config, _FIELD, None), LiveMarker):
        setattr(config, _FIELD, LiveMarker(streams=streams, variant=variant))


def is_from_checkpoint(root: nn.Module) -> bool:
    """True if the model's config was read from a file that a converted model had written."""
    note = getattr(getattr(root, "config", None), _FIELD, None)
    return isinstance(note, dict) and not isinstance(note, LiveMarker)


def unmark(root: nn.Module) -> None:
    """Take the note off again, unless another converted model shares the config."""
    _roots.discard(root)
    config = getattr(root, "config", None)
    if not isinstance(getattr(config, _FIELD, None), dict):
        return
    if not any(getattr(other, "config", None) is config and any(hyper_connections(other)) for other in _roots):
        delattr(config, _FIELD)
