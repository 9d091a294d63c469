"""Put every architecture through the backend: build, run plainly, convert, compare, train two steps.

One process each, so that none can take down the rest. Where ``status.json`` knows which configuration and inputs run,
they are taken; otherwise they are searched.

    python -m tests.zoo.wide.run [--shard i/n] [--only name ...] [--status word ...] [--timeout s] [--output file]
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
import warnings
from collections.abc import Callable
from typing import Any

import torch

from mhc_compile.errors import MhcError, NoSiteError, NotConvertedWarning
from tests.zoo import base, convert, get
from tests.zoo.base import Example
from tests.zoo.wide import expect, feed, status
from tests.zoo.wide.catalogue import Attempt, attempts
from tests.zoo.wide.counted import COUNTED

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
                base.projection_loss(output).backward()
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


def kind_of(inputs: dict[str, Any]) -> str:
    """What goes in, in a word."""
    names = " ".join(inputs)
    words = "ids" in names or "embeds" in names
    images = "pixel" in names or "image" in names or "patches" in names or "grid" in names or "visual" in names
    sounds = "input_features" in names or "input_values" in names
    kind = "multimodal" if words + images + sounds > 1 and "decoder" not in names else ""
    kind = kind or ("vision" if images else "audio" if sounds else "text" if words else "other")
    return f"{kind}, encoder-decoder" if "decoder_input" in names else kind


def judge(example: Example, row: dict[str, Any], again: Callable[[], Example]) -> None:
    """Fill in what the backend makes of a model that runs: status, sites, reason, problems.

    ``again`` makes another copy of the example. Where the numbers differ by more than the usual rounding, they are held
    against what the model itself makes of rounding.
    """
    counted = expect.count(example)
    expected = COUNTED[row["name"]][0] if row["name"] in COUNTED else counted.pre_norm
    row.update(expected=expected, post_norm=counted.post_norm, where=counted.where)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", NotConvertedWarning)
            outcome = convert.check(example, {"compiler": "eager"})
        if outcome.problems and all("differs by" in problem for problem in outcome.problems):
            torch._dynamo.reset()
            row["shaken"] = outcome.problems[:3]
            outcome = convert.check(again(), {"compiler": "eager"}, convert.shake(again()))
    except MhcError as error:
        left = [f"{r.where} {r.reason}" for r in error.report.left_alone] if error.report is not None else []
        row.update(status="refused", sites=0, reason=str(error.what), left=left)
        if "internal error" in error.what or (expected and "nothing to widen" in error.what):
            row["status"] = "wrong"
        else:
            row["cured"] = cured(again, error, {expected, counted.pre_norm + counted.post_norm})
        return
    except torch._dynamo.exc.TorchRuntimeError:
        row["reason"] = fails_plainly(again())
        if not row["reason"]:
            raise
        row.update(status="refused", sites=0)
        return
    told = [w.message.what for w in caught if isinstance(w.message, NotConvertedWarning)]
    row["told"] = told
    places = [f"{s.where} {s.module} {s.kind}" for report in outcome.reports for s in report.sites]
    left = [f"{r.where} {r.module} {r.reason}" for report in outcome.reports for r in report.left_alone]
    row.update(sites=outcome.sites, graphs=len(outcome.reports), problems=outcome.problems, places=places, left=left)
    raised = sum(report.raised for report in outcome.reports)
    # Four adds and then a norm (a conformer's layer) are a chain that ends, not a norm between the adds.
    fits = outcome.sites in (expected, counted.pre_norm + counted.post_norm) and outcome.sites > 0
    row["status"] = "converted" if (fits or raised) and not outcome.problems else "wrong"
    if raised:
        row["reason"] = f"its own hyper-connections are recognised: {raised} ops raised"
    elif not outcome.reports and told:
        row["status"], row["reason"] = "refused", next((t for t in told if "residual chain" in t), told[0])
        row["cured"] = cured(again, NoSiteError(row["reason"]), {expected, counted.pre_norm + counted.post_norm})
    elif not outcome.reports:
        row["reason"] = "nothing was widened and nobody was told"
    elif not fits:
        row["reason"] = f"{outcome.sites} sites, {expected} adds in the source"
    if outcome.problems:
        row["reason"] = outcome.problems[0]


CAPTURE = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}


def cured(again: Callable[[], Example], refusal: MhcError, expected: set[int]) -> str:
    """What the refusal names as its cure, and how many sites that gives, if it gives what is expected or more.

    (More, because the source's names show fewer of the adds of post-norm models than there are.)
    """
    options: dict[str, object] = {"compiler": "eager"}
    settings: dict[str, bool] = {}
    if "per_stream" in refusal.what:
        options["post_norm"], words = "per_stream", "post_norm='per_stream'"
    elif "capture_scalar_outputs" in (refusal.cure or ""):
        settings, words = CAPTURE, "torch._dynamo.config.capture_scalar_outputs, capture_dynamic_output_shape_ops"
    else:
        return ""
    torch._dynamo.reset()
    try:
        with torch._dynamo.config.patch(settings):
            outcome = convert.check(again(), options)
            if outcome.problems and all("differs by" in problem for problem in outcome.problems):
                torch._dynamo.reset()
                outcome = convert.check(again(), options, convert.shake(again()))
    except Exception:  # no cure then
        return ""
    whole = outcome.sites >= max(*expected, 1) and not any("post-norm" in reason for reason in outcome.reasons)
    return f"{words}: {outcome.sites} sites" if whole and not outcome.problems else ""


def fails_plainly(example: Example) -> str:
    """What ``torch.compile`` with its own backend "eager" says, where it cannot run the model either; else empty."""
    torch._dynamo.reset()
    try:
        step = torch.compile(example.model, backend="eager")
        step(**example.inputs)
    except torch._dynamo.exc.TorchRuntimeError as error:
        return f"torch.compile(backend='eager') cannot capture it either: {str(error).splitlines()[0]}"
    return ""


def again(attempt: Attempt, row: dict[str, Any]) -> Example:
    """The example of a row once more, bit for bit."""
    example = attempt.example(0, row["level"], row["ladder"])
    assert example is not None
    return example


def look(attempt: Attempt) -> dict[str, Any]:
    """One row of ``status`` with some more for the eye; ``stage`` says how far it got."""
    row: dict[str, Any] = {
        "name": attempt.name,
        "model": attempt.model_class,
        "stage": "config",
        "status": "unbuildable",
    }
    started = time.perf_counter()
    known = {r.name: r for r in status.load()}.get(attempt.name)
    try:
        example = None
        if known is not None and known.status != "unbuildable":
            row.update(level=known.level, ladder=known.ladder)
            example = attempt.example(0, known.level, known.ladder)
        example = example or search(attempt, row)
        row["kind"] = kind_of(dict(example.inputs))
        row["stage"] = "convert"
        judge(example, row, lambda: again(attempt, row))
        row["stage"] = "done"
    except BaseException as error:  # the row is the report; the process ends here in any case
        row["reason"] = f"{type(error).__name__}: {error}"[:400]
        row["traceback"] = row.get("traceback") or traceback.format_exc()[-3000:]
        if row["stage"] == "convert":
            row["status"] = "wrong"
    row["seconds"] = round(time.perf_counter() - started, 2)
    return row


def apart(attempt: Attempt, seconds: int) -> dict[str, Any]:
    """``look`` in a forked process with a time and memory limit."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.alarm(seconds)
        warnings.simplefilter("ignore")
        with os.fdopen(write, "w") as pipe:
            json.dump(look(attempt), pipe, default=str)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if text:
        row: dict[str, Any] = json.loads(text)
        return row
    reason = f"limit of {seconds} s or {MEMORY >> 30} GiB"
    return {"name": attempt.name, "model": attempt.model_class, "status": "limit", "reason": reason}


def warm() -> None:
    """Build and convert something here, so that the forked processes need not import the libraries each."""
    torch.set_num_threads(1)
    convert.check(get("llama").build(0), {"compiler": "eager"})
    torch._dynamo.reset()


def main() -> None:
    """Print a line for each attempt; write all rows as JSON lines."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--status", nargs="*", default=[], help="only those that status.json has under these words")
    parser.add_argument("--timeout", type=int, default=120)
    parser.add_argument("--output", default="")
    options = parser.parse_args()
    warm()
    index, count = map(int, options.shard.split("/"))
    before = {row.name: row.status for row in status.load()}
    wanted = [a for a in attempts() if not options.only or a.name in options.only]
    wanted = [a for a in wanted if not options.status or before.get(a.name, "new") in options.status]
    with open(options.output, "a") if options.output else open(os.devnull, "w") as file:
        for attempt in wanted[index::count]:
            row = apart(attempt, options.timeout)
            why = " ".join(row.get("reason", "").split())[:150]
            numbers = f"{row.get('sites')}/{row.get('expected')}+{row.get('post_norm')}"
            print(f"{row['name']:36} {row['status']:11} {numbers:8} {row.get('seconds', 0):6}", why, flush=True)
            if options.only and row.get("traceback"):
                print(row["traceback"], file=sys.stderr)
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
