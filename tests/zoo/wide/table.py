"""``docs/models.md`` from the committed ``status.json`` and the hand-written entries.

python -m tests.zoo.wide.table      (after tests.zoo.wide.run and tests.zoo.wide.status)
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.zoo import entries
from tests.zoo.wide.status import Row, load

PATH = Path(__file__).parents[3] / "docs" / "models.md"
_RAN = ("converted", "refused", "wrong", "limit")

HEAD = """# Models

Made by `python -m tests.zoo.wide.table` from `tests/zoo/wide/status.json`, which
`python -m tests.zoo.wide.run --output rows.jsonl` and `python -m tests.zoo.wide.status rows.jsonl` fill; do not edit it
by hand. `make zoo` runs every row again and fails when a status has changed in either direction.

Each model is tiny (hidden size 64, two or three layers, random weights, fp32, training mode, CPU; transformers 5.23)
and goes through `torch.compile(model, backend="mhc", options={"compiler": "eager"})`.

- **converted**: as many sites as residual adds counted in the source of the layers (`tests/zoo/wide/expect.py`, or by
  hand with a reason in `counted.py`); outputs (relative 1e-5) and gradients (1e-4) of the first step are the plain
  model's, or as close as rounding lets the plain model be to itself; two AdamW steps, a finite gradient on every new
  parameter.
- **refused**: the backend raised the given reason, or warned of it where a graph break leaves no graph to raise in, and
  nothing was changed.
- **wrong**: the number of sites is not the expected one, a number differs, or nothing was said. These are open.
- **limit**: the time or memory of one run did not suffice.
- **unbuildable**: no tiny model that runs plainly came out of the rules; it says nothing about the backend.
- **untried**: the plain model runs; the conversion has not been run.
"""


def render(rows: list[Row]) -> str:
    """The whole page."""
    counts = Counter(row.status for row in rows)
    ran = sum(counts[status] for status in _RAN)
    cured = sum(bool(row.cured) for row in rows)
    parts = [HEAD, "## Summary\n"]
    parts.append(
        f"{len(rows)} architectures attempted, {len(rows) - counts['unbuildable']} built, {ran} put through the "
        f"backend: "
        f"{counts['converted']} converted, {counts['refused']} refused with a reason ({cured} of them are converted "
        f"with the option or setting that the reason names), {counts['wrong']} wrong, "
        f"{counts['limit']} out of limits. Not run: {counts['untried']} untried, {counts['unbuildable']} unbuildable.\n"
    )
    parts += [
        "## Checked on every run of the tests\n",
        "| architecture | kind | sites | status | reason |",
        "|---|---|---|---|---|",
    ]
    for entry in entries():
        sites = entry.sites(entry.build(0).model)
        if entry.status == "refused":
            parts.append(f"| {entry.name} | {entry.kind} | 0 | refused | {entry.reason} |")
            if not entry.options:
                continue
        options = (
            ", ".join(f"`{k}={v!r}`" for k, v in entry.options.items()) if entry.status == "refused" else entry.rule
        )
        parts.append(f"| {entry.name} | {entry.kind} | {sites} | converted | {options} |")
    parts += [
        "\n## Every registered architecture\n",
        "| architecture | kind | sites | status | reason |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row.name):
        if row.status in _RAN:
            sites = "" if row.sites is None else str(row.sites)
            reason = f"{row.reason} — converted with `{row.cured}`" if row.cured else row.reason
            parts.append(f"| {row.name} | {row.kind} | {sites} | {row.status} | {_cell(reason)} |")
    parts += ["\n## Untried\n", ", ".join(sorted(row.name for row in rows if row.status == "untried")) or "None."]
    parts += ["\n## Unbuildable\n", "| architecture | model | error of the most natural try |", "|---|---|---|"]
    parts += [f"| {r.name} | {r.model} | {_cell(r.reason)} |" for r in rows if r.status == "unbuildable"]
    return "\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Write the page."""
    PATH.write_text(render(load()))


if __name__ == "__main__":
    main()
