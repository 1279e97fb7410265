"""The demo model on the host and with continuous batching, and the number of its decode steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from florence_onnx import Florence2, Region, tasks

SAMPLES = sorted((Path(tasks.__file__).parent / "demo" / "samples").glob("*.png"))
GIVEN: dict[str, dict[str, Any]] = {
    "nothing": {},
    "text": {"text_input": "a red circle and a green square"},
    "region": {"region": Region(217, 475, 377, 648)},
}
"""What tasks are given, by their `needs`."""
WAYS = {"host": 0, "continuous batching": 4}
"""`max_batch` of each."""


def load(max_batch: int) -> Florence2:
    """The demo model with one thread."""
    options = {"intra_op_num_threads": 1}
    return Florence2.from_pretrained("demo", device="cpu", session_options=options, max_batch=max_batch)


def count_steps(model: Florence2) -> Callable[[], float]:
    """What returns the number of decoder runs from now on."""
    decoder = model._text_model._decoder  # type: ignore[attr-defined]
    before = decoder.num_runs
    return lambda: float(decoder.num_runs - before)
