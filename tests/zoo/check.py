"""What an entry must do on its own, before our backend is asked anything: run, repeat, be captured."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from tests.zoo.base import Entry, Example


def run(example: Example, model: Callable[..., Any] | None = None) -> tuple[Tensor, list[Tensor | None]]:
    """Loss (0-dim, detached) and the gradient of each parameter (None where the model does not use it).

    ``model`` is what is called; by default the example's own. ValueError if the loss is not finite.
    """
    example.model.zero_grad(set_to_none=True)
    loss = example.loss((example.model if model is None else model)(**example.inputs))
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is {loss.item()}")
    loss.backward()
    return loss.detach(), [None if p.grad is None else p.grad.clone() for p in example.model.parameters()]


def capture(example: Example) -> list[fx.GraphModule]:
    """The graphs that Dynamo makes of one forward pass in training mode (they are run as they are)."""
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(example.model, backend=keep)(**example.inputs)
    torch._dynamo.reset()
    return graphs


def facts(entry: Entry) -> dict[str, Any]:
    """Run every check of one entry; the keys are columns of the table, "error" is empty if all is well."""
    started = time.perf_counter()
    row: dict[str, Any] = {
        "name": entry.name,
        "kind": entry.kind,
        "sites": None,
        "graphs": None,
        "unused": None,
        "error": "",
    }
    try:
        example = entry.build(0)
        row["sites"] = entry.sites(example.model)
        loss, gradients = run(example)
        row["loss"] = loss.item()
        row["unused"] = sum(gradient is None for gradient in gradients)
        again, repeated = run(entry.build(0))
        same = all(
            (a is b) if a is None or b is None else torch.equal(a, b) for a, b in zip(gradients, repeated, strict=True)
        )
        if not (torch.equal(loss, again) and same):
            row["error"] = "not deterministic"
        row["graphs"] = len(capture(example))
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".split("\n")[0]
        row["traceback"] = traceback.format_exc()
    row["seconds"] = time.perf_counter() - started
    return row


def main() -> None:
    """Print one line for each entry (or for those named), and the traceback of each that fails."""
    from tests.zoo import entries

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="*")
    wanted = parser.parse_args().names
    for entry in entries():
        if wanted and entry.name not in wanted:
            continue
        row = facts(entry)
        print(
            f"{row['name']:34} {row['kind']:16} sites={row['sites']} graphs={row['graphs']} unused={row['unused']} "
            f"loss={row.get('loss', float('nan')):.4f} {row['seconds']:.1f}s {row['error']}",
            flush=True,
        )
        if wanted and row["error"]:
            print(row.get("traceback", ""))


if __name__ == "__main__":
    main()
