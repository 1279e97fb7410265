"""What a card is asked while a model answers, on a machine without one: CUDA libraries that compute nothing, and count.

What the kernels would compute is not shown here; how often memory is taken, what crosses between host and device, and what is
captured and replayed is.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.cuda import cuda_stub

REASON = cuda_stub.unavailable()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON or "never")

SENT = 4 * 256
"""Bytes of a step of one prompt with three beams: ids, positions, slots and 64 slots' visibility, each in its 256 bytes."""
RECEIVED = 512 + 768 + 256
"""Of its 32 best tokens' values and ids, and the sums."""


def run(step: str, memory: int | None = None) -> Any:
    """What `tests.cuda.cuda_running` found in one of its steps; `memory`, bytes of the card."""
    return cuda_stub.run("-m", "tests.cuda.cuda_running", step, memory=memory)


@pytest.fixture(scope="module")
def steady() -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = run("steady")
    return found


def test_every_shape_is_captured_once(steady: dict[str, dict[str, int]]) -> None:
    """The text encoder, the step that opens an answer with two tokens, and that of three beams."""
    assert steady["first of 1"]["cudaStreamBeginCapture"] == steady["first of 1"]["cudaStreamEndCapture"] == 3
    # seven more places for prompts to be encoded to, and the first again, since all buffers are others; two kinds of step
    assert steady["first of 8"]["cudaStreamBeginCapture"] == 8 + 2
    for name, calls in steady.items():
        assert name.startswith("first") or calls["cudaStreamBeginCapture"] == 0, name


@pytest.mark.parametrize("count", [1, 8])
def test_a_known_shape_is_one_launch_a_step(steady: dict[str, dict[str, int]], count: int) -> None:
    calls = steady[f"clear scores, {count}"]
    assert (calls["prompts"], calls["steps"], calls["answers"]) == (count, 11, count)
    assert calls["cudaGraphLaunch"] == count + 11
    assert calls["kernels"] == 0
    assert steady[f"first of {count}"]["kernels"] > 100, "the count itself works"


def test_nothing_is_asked_in_a_capture_that_no_capture_allows(steady: dict[str, dict[str, int]]) -> None:
    """That the count works is shown in `tests/cuda/test_cuda_stub.py`."""
    for name, calls in steady.items():
        assert calls[cuda_stub.NOT_CAPTURABLE] == 0, name


@pytest.mark.parametrize("count", [1, 8])
def test_a_known_shape_takes_no_memory(steady: dict[str, dict[str, int]], count: int) -> None:
    assert steady[f"clear scores, {count}"]["cudaMalloc"] == 0
    assert steady["first of 1"]["cudaMalloc"] > 0, "the count itself works"


def test_a_step_sends_a_kilobyte_and_gets_a_little_more(steady: dict[str, dict[str, int]]) -> None:
    calls = steady["clear scores, 1"]
    opening = 256 + 512 + 256  # two tokens instead of three, which of the rest is hidden in its 256 bytes
    assert calls["bytes device to host"] == 10 * RECEIVED + opening
    prompt = 2 * 256 + 8 * (65 + 16)  # ids and mask of 16 tokens, then the encoder's mask
    assert calls["bytes host to device"] == 11 * SENT + prompt
    assert calls["bytes device to device"] == 65 * 128 * 4, "the features, to where the CUDA graph reads them"


def test_all_logits_cross_only_where_the_best_do_not_decide(steady: dict[str, dict[str, int]]) -> None:
    """Scores that are all equal, and of eight prompts once for all."""
    vocabulary = 4 * 1568
    assert steady["equal scores, 1"]["bytes device to host"] > 11 * vocabulary
    assert steady["equal scores, 8"]["bytes device to host"] < 11 * (8 * 3 * vocabulary + 8 * RECEIVED) * 1.1
    assert steady["clear scores, 8"]["bytes device to host"] <= 11 * 8 * RECEIVED


def test_without_cuda_graphs_the_same_crosses(steady: dict[str, dict[str, int]]) -> None:
    calls = run("without_graphs")
    assert calls["cudaGraphLaunch"] == calls["cudaStreamBeginCapture"] == 0
    assert calls["kernels"] > 500
    assert calls["bytes host to device"] == steady["equal scores, 1"]["bytes host to device"]
    assert calls["cudaMalloc"] == 0


def test_what_staying_on_the_device_saves(steady: dict[str, dict[str, int]]) -> None:
    through_the_host = run("through_the_host")
    for direction in ("bytes host to device", "bytes device to host"):
        assert through_the_host[direction] > 20 * steady["clear scores, 1"][direction]


def test_through_the_host_every_step_sends_what_it_is_fed() -> None:
    """Ids, positions, masks, keys and values: all that the host holds, and not only what it held when buffers were bound."""
    calls = run("through_the_host")
    layers, heads, head_dim, num_encoded, capacity = 3, 4, 32, 65 + 4, 64
    of_a_step = 2 * layers * heads * head_dim * (num_encoded + capacity) * 2
    assert calls["bytes host to device"] > calls["steps"] * of_a_step


def test_a_card_too_small_for_many_prompts_answers_them_fewer_at_a_time() -> None:
    found = run("full", memory=11_500_000)
    assert found["answers"] == [1, 16, 1]
    assert 1 <= found["batch_size"] < 16
    assert run("full")["batch_size"] == 16, "it was the memory"


def test_a_card_that_is_full_is_a_clear_error() -> None:
    found = run("too_small", memory=8_000_000)
    for step in ("load", "run"):
        name, text = found[step]
        assert name == "DeviceMemoryError"
        assert "a smaller max_batch, fewer beams or an fp16 bundle need less" in text


def test_the_memory_that_is_taken_is_what_was_reckoned_with() -> None:
    """All that ONNX Runtime takes of the card, by number of prompts, against `florence_onnx.bundles.memory`."""
    for count, (taken, reckoned) in run("memory").items():
        assert 0.8 * reckoned < taken < 1.2 * reckoned, count
