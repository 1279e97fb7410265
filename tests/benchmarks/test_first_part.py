"""The benchmark of streams: figures of one answer."""

from __future__ import annotations

from benchmarks.cpu.first_part import SAMPLES, measure
from florence_onnx import Florence2, tasks


def test_the_first_box_of_three() -> None:
    model = Florence2.from_pretrained("demo", device="cpu", session_options={"intra_op_num_threads": 1})
    figures = measure(model, tasks.OBJECT_DETECTION, SAMPLES[0], num_beams=1, rounds=1)
    assert figures is not None
    assert 0.2 < figures.steps < 0.5, "three boxes of about six tokens"
    assert 0 < figures.time < 1 and figures.stream > 0
