"""What a check has found, as rows: a table for people, JSON for machines, and an exit code."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich import box
from rich.table import Table

Verdict = Literal["agrees", "disagrees", "unsettled", "not tried"]
"""`unsettled`: another answer than published, of a checkpoint that may have changed since, and transformers gives it too."""

EXPORT = "export"
"""`Row.what` of the comparison of an export with transformers."""


@dataclass(frozen=True)
class Row:
    """One thing that was tried, or could not be."""

    checkpoint: str
    what: str
    """`EXPORT`, or a task and an image."""
    verdict: Verdict
    detail: str
    source: str | None = None
    """Where the answer was published."""
    image: str | None = None
    image_sha256: str | None = None
    """Of the file that was used."""
    is_image_known: bool = False
    """Whether that hash was known beforehand."""


def exit_code(rows: Sequence[Row]) -> int:
    """0 if everything agrees, 1 if anything disagrees, 2 if something could not be tried or settled."""
    found = {row.verdict for row in rows}
    if "disagrees" in found:
        return 1
    return 0 if found == {"agrees"} else 2


def is_finished(rows: Sequence[Row]) -> bool:
    """Whether there is nothing to try again."""
    return bool(rows) and all(row.verdict != "not tried" for row in rows)


def make_table(rows: Sequence[Row]) -> Table:
    """A row for each thing that was tried."""
    table = Table(title=summarise(rows), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("checkpoint", "what", "verdict", "found"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(row.checkpoint, row.what, row.verdict, row.detail)
    return table


def summarise(rows: Sequence[Row]) -> str:
    """How many rows have each verdict, in a line."""
    counts = Counter(row.verdict for row in rows)
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()) or "nothing to check"


def unknown_images(rows: Sequence[Row]) -> dict[str, str]:
    """SHA-256 by image name, of images whose hash was not known: worth reporting."""
    return {row.image: row.image_sha256 for row in rows if row.image and row.image_sha256 and not row.is_image_known}


def to_dict(rows: Sequence[Row], versions: Mapping[str, Any]) -> dict[str, Any]:
    """Everything for JSON, with what others need to compare: versions, the machine, hashes of the images."""
    return {
        "summary": summarise(rows),
        "exit_code": exit_code(rows),
        "versions": dict(versions),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "unknown_images": unknown_images(rows),
        "rows": [asdict(row) for row in rows],
    }
