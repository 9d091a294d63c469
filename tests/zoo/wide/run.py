"""Attempt every architecture: build, run forward and backward, capture.

One process each, so that none can take down the rest.

python -m tests.zoo.wide.run [--shard i/n] [--only name ...] [--timeout seconds] [--output file]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import time
import traceback
from typing import Any

from tests.zoo import base, check, get
from tests.zoo.base import Example
from tests.zoo.wide import expect, feed
from tests.zoo.wide.catalogue import Attempt, attempts

MEMORY = 8 << 30
"""Address space of one attempt in bytes: a configuration that no rule made small fails here instead of swapping."""


LARGEST = 30_000_000
"""Parameters that a less shrunken configuration may have."""


def search(attempt: Attempt, row: dict[str, Any]) -> Example:
    """The first configuration level that builds and the first rung of inputs that runs forward and backward.

    Both go into the row ("level", "ladder"), so that the example can be made again without a search. The error that is
    raised if nothing runs is that of the most natural try: level 0, first rung.
    """
    first: Exception | None = None
    stages = ["config", "build", "forward", "backward"]
    for level in range(3):
        # Wide models are slow to build: fewer rungs for them.
        for ladder in range(len(feed.EXTRA) * feed.VARIANTS if level == 0 else 5):
            stage = "config"
            try:
                if ladder == 0:
                    attempt.config(level)
                stage = "build"
                if level and not ladder and attempt.size(level) > LARGEST:
                    break
                example = attempt.example(0, level, ladder)
                if example is None:
                    continue
                stage = "forward"
                output = example.model(**example.inputs)
                stage = "backward"
                base.projection_loss(output).backward()  # type: ignore[no-untyped-call]
            except Exception as error:
                if first is None:
                    first, row["traceback"] = error, traceback.format_exc()[-3000:]
                row["stage"] = max(row["stage"], stage, key=stages.index)
                if stage in ("config", "build"):
                    break
                continue
            row.update(level=level, ladder=ladder, stage="backward", traceback="")
            row["parameters"] = sum(p.numel() for p in example.model.parameters())
            row["inputs"] = {k: list(getattr(v, "shape", [])) for k, v in example.inputs.items()}
            return example
    raise first or ValueError("no inputs apply")


def look(attempt: Attempt, capture: bool = True) -> dict[str, Any]:
    """One row: where the attempt got to ("stage"), and why not further ("error")."""
    row: dict[str, Any] = {
        "name": attempt.name,
        "model": attempt.model_class,
        "stage": "config",
        "graphs": None,
        "error": "",
    }
    started = time.perf_counter()
    try:
        example = search(attempt, row)
        if capture:
            row["stage"] = "capture"
            row["graphs"] = len(check.capture(example))
        counted = expect.count(example)
        row.update(expected=counted.pre_norm, post_norm=counted.post_norm, where=counted.where, stage="done")
    except BaseException as error:  # the row is the report; the process ends here in any case
        row["error"] = f"{type(error).__name__}: {error}"[:400]
        row["traceback"] = row.get("traceback") or traceback.format_exc()[-3000:]
    row["seconds"] = round(time.perf_counter() - started, 2)
    return row


def apart(attempt: Attempt, seconds: int, capture: bool = True) -> dict[str, Any]:
    """``look`` in a forked process with a time and memory limit."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.alarm(seconds)
        with os.fdopen(write, "w") as pipe:
            json.dump(look(attempt, capture), pipe, default=str)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return (
        json.loads(text)
        if text
        else {
            "name": attempt.name,
            "model": attempt.model_class,
            "stage": "killed",
            "error": f"limit of {seconds} s or memory",
        }
    )


def main() -> None:
    """Print a line for each attempt; write all rows as JSON lines."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--no-capture", action="store_true", help="stop after the backward pass")
    parser.add_argument("--timeout", type=int, default=60)
    parser.add_argument("--output", default="")
    options = parser.parse_args()
    # Build (and compile) something here, so that the forked processes need not import the libraries each.
    check.facts(get("llama"))
    index, count = map(int, options.shard.split("/"))
    with open(options.output, "w") if options.output else open(os.devnull, "w") as file:
        for number, attempt in enumerate(attempts()):
            if number % count != index or (options.only and attempt.name not in options.only):
                continue
            row = apart(attempt, options.timeout, not options.no_capture)
            why = row["error"].replace("\n", " ")[:150]
            line = f"{row['name']:36} {row['stage']:9} {row.get('graphs')} {row.get('seconds', 0):6}"
            print(line, why, flush=True)
            if options.only and row["error"]:
                print(row.get("traceback", ""), file=sys.stderr)
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
