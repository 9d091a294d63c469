"""The attempts: one for each model type that transformers registers, with the class that is built for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers.models.auto import configuration_auto, modeling_auto

from tests.zoo import base
from tests.zoo.base import Example
from tests.zoo.wide import feed, shrink
from tests.zoo.wide.exceptions import EXCEPTIONS

FALLBACK_ORDER = [
    "MODEL_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
]


@dataclass(frozen=True)
class Attempt:
    """One architecture: its model type and the names of the configuration and model classes."""

    name: str
    config_class: str
    model_class: str
    settings: dict[str, Any] = field(default_factory=dict)

    def config(self, level: int = 0) -> transformers.PreTrainedConfig:
        """A tiny configuration (``shrink.arguments`` has the levels); the exception's settings win over the rules."""
        kind = getattr(transformers, self.config_class)
        exception = EXCEPTIONS.get(self.name)
        return kind(**merge(shrink.arguments(kind(), level=level), dict(exception.settings) if exception else {}))

    def size(self, level: int) -> int:
        """Number of parameters at this level, without making them."""
        with torch.device("meta"):
            return sum(p.numel() for p in getattr(transformers, self.model_class)(self.config(level)).parameters())

    def build(self, seed: int, level: int = 0) -> tuple[torch.nn.Module, transformers.PreTrainedConfig]:
        """The finished model and its configuration."""
        torch.manual_seed(seed)
        config = self.config(level)
        factory = getattr(transformers, self.model_class)
        try:
            # The eager loop over experts breaks the graph; models without experts refuse the choice.
            model = factory._from_config(config, experts_implementation="batched_mm")
        except (ValueError, TypeError, AttributeError):
            torch.manual_seed(seed)
            config = self.config(level)
            model = factory._from_config(config) if hasattr(factory, "_from_config") else factory(config)
        return base.finish(model, seed), config

    def example(self, seed: int, level: int = 0, ladder: int = 0) -> Example | None:
        """The model with inputs of this rung of ``feed.EXTRA`` (None: the rung does not apply)."""
        model, config = self.build(seed, level)
        exception = EXCEPTIONS.get(self.name)
        given = (
            exception.inputs(seed, config)
            if exception and exception.inputs
            else feed.inputs(model, config, seed, ladder)
        )
        return None if given is None else Example(model, given, base.projection_loss)


def merge(base_settings: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Settings with those of ``over`` laid on top, nested dictionaries merged."""
    merged = dict(base_settings)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def attempts() -> Iterator[Attempt]:
    """Every registered model type, in the order of the registry; the base model where there is one."""
    tables = [n for n in dir(modeling_auto) if n.endswith("_MAPPING_NAMES") and n != "CONFIG_MAPPING_NAMES"]
    tables = FALLBACK_ORDER + [n for n in tables if n not in FALLBACK_ORDER]
    for name, config_class in configuration_auto.CONFIG_MAPPING_NAMES.items():
        for table in tables:
            entry = getattr(modeling_auto, table, {}).get(name)
            if entry:
                exception = EXCEPTIONS.get(name)
                found = entry if isinstance(entry, str) else entry[0]
                yield Attempt(
                    name, config_class, exception.model_class if exception and exception.model_class else found
                )
                break
