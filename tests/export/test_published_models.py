"""`pytest -m hub`: the published checkpoints themselves. Needs a network, many minutes and gigabytes.

The hub is that of the environment variable HF_ENDPOINT; FLORENCE_ONNX_ANSWERS names other published answers, and
FLORENCE_ONNX_IMAGES a folder with images whose address is dead.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import NO_TORCH

pytest.importorskip("optimum.exporters", reason=NO_TORCH)
from export.published.answers import PUBLISHED_ANSWERS, read_published
from export.published.check import Settings, check, targets
from export.published.downloads import make_plan

PUBLISHED = read_published(Path(os.environ.get("FLORENCE_ONNX_ANSWERS", PUBLISHED_ANSWERS)))
IMAGES = os.environ.get("FLORENCE_ONNX_IMAGES")


@pytest.mark.hub
@pytest.mark.parametrize("target", targets(PUBLISHED, ()))
def test_a_published_checkpoint(target: str, tmp_path: Path) -> None:
    """What `florence-onnx-export check` checks; what could not be tried is a skip with its reason."""
    checkpoint, _, revision = target.partition("@")
    plan = make_plan(checkpoint, revision or None)
    if plan.problem is not None and not plan.is_cached:
        pytest.skip(f"needs a network and the hub, to download {target}: {plan.problem}")
    rows = list(check(PUBLISHED, [target], Settings(tmp_path / "work", Path(IMAGES) if IMAGES else None)))
    assert not [row for row in rows if row.verdict == "disagrees"]
    untried = [f"{row.what}: {row.detail}" for row in rows if row.verdict != "agrees"]
    if untried:
        pytest.skip("; ".join(untried))
