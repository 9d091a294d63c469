"""A sample of the wide zoo on another transformers: ``docs/models-<version>.md`` from the version that is installed.

    python -m tests.zoo.sample [--only name ...] [--timeout s]

The rows are made as those of ``docs/models.md`` are (``tests.zoo.wide.run``) and are held against them: a sample shows
whether what was found is a matter of one version's sources.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import torch
import transformers

from tests.zoo.wide import run, status
from tests.zoo.wide.catalogue import attempts

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (
    "llama mistral mixtral qwen2 qwen3_moe gemma2 gemma3_text phi3 gpt2 gpt_neox gptj falcon opt bloom cohere2 granite "
    "deepseek_v3 olmo2 starcoder2 mamba2 jamba bert roberta-prelayernorm modernbert"
)
OTHERS = "mbart bart mt5 whisper vit dinov2 convnext clip siglip llava wav2vec2 audio-spectrogram-transformer"
NAMES = (*TEXT.split(), *OTHERS.split())

HEAD = """# Models, transformers {version}

A sample of [models.md](models.md) with transformers {version} and torch {torch} (CPU), made by
`python -m tests.zoo.sample` where these are installed; do not edit it by hand. The words are those of that page; the
last column is what it says.

{summary}

| architecture | kind | sites | status | reason | in models.md |
|---|---|---|---|---|---|
"""


def page(version: str) -> Path:
    """Where the table of a version of transformers is; patch releases share one."""
    return DOCS / f"models-{'.'.join(version.split('.')[:2])}.md"


def render(rows: list[status.Row]) -> str:
    """The whole page. ``rows``: those of this run, in order."""
    listed = {row.name: row for row in status.load()}
    counts = Counter(row.status for row in rows)
    numbers = ", ".join(f"{counts[word]} {word}" for word in sorted(counts))
    summary = f"{len(rows)} architectures: {numbers}."
    text = HEAD.format(version=transformers.__version__, torch=torch.__version__.split("+")[0], summary=summary)
    for row in rows:
        there = listed.get(row.name)
        other = "" if there is None else f"{there.status}, {there.sites} sites"
        other = "the same" if other == f"{row.status}, {row.sites} sites" else other
        sites = "" if row.sites is None else str(row.sites)
        reason = row.reason.replace("|", "\\|")
        text += f"| {row.name} | {row.kind} | {sites} | {row.status} | {reason} | {other} |\n"
    return text


def main() -> None:
    """Run the sample, print a line for each, write the page (unless only some were asked for)."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--timeout", type=int, default=240)
    options = parser.parse_args()
    run.warm()
    wanted = options.only or NAMES
    known = {attempt.name: attempt for attempt in attempts()}
    rows = []
    for name in wanted:
        row = status.row_of(run.apart(known[name], options.timeout))
        counts = f"{row.sites} of {row.expected} + {row.post_norm}"
        print(f"{row.name:32} {row.status:12} {counts}  {row.reason}", flush=True)
        rows.append(row)
    if not options.only:
        page(transformers.__version__).write_text(render(rows))


if __name__ == "__main__":
    main()
