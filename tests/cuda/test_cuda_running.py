"""Calls to CUDA while a model runs, counted under the stub on a machine without a GPU.

Shown are allocations, copies between host and device, and captured and replayed graphs; not what the kernels compute.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.cuda import cuda_stub

REASON = cuda_stub.unavailable()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON or "never")

SENT = 4 * 256
"""Bytes uploaded by a step of one prompt with three beams: ids, positions, slots, mask of 64 slots; aligned to 256."""
RECEIVED = 512 + 768 + 256
"""Bytes downloaded by the same step: values and ids of the top 32 tokens of each beam, and the log-sums."""


def run(step: str, memory: int | None = None) -> Any:
    """Runs a step of `tests.cuda.cuda_running` under the stub, on a GPU with `memory` bytes."""
    return cuda_stub.run("-m", "tests.cuda.cuda_running", step, memory=memory)


@pytest.fixture(scope="module")
def steady() -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = run("steady")
    return found


def test_every_shape_is_captured_once(steady: dict[str, dict[str, int]]) -> None:
    """The text encoder, the step that opens an answer with two tokens, and that of three beams."""
    assert steady["first of 1"]["cudaStreamBeginCapture"] == steady["first of 1"]["cudaStreamEndCapture"] == 3
    # the text encoder for each of eight batch indices, all anew since the buffers were replaced, and two shapes of a
    # step
    assert steady["first of 8"]["cudaStreamBeginCapture"] == 8 + 2
    for name, calls in steady.items():
        assert name.startswith("first") or calls["cudaStreamBeginCapture"] == 0, name


@pytest.mark.parametrize("count", [1, 8])
def test_a_known_shape_is_one_launch_a_step(steady: dict[str, dict[str, int]], count: int) -> None:
    calls = steady[f"distinct scores, {count}"]
    assert (calls["prompts"], calls["steps"], calls["answers"]) == (count, 11, count)
    assert calls["cudaGraphLaunch"] == count + 11
    assert calls["kernels"] == 0
    assert steady[f"first of {count}"]["kernels"] > 100, "the count works"


def test_no_call_is_made_that_a_capture_forbids(steady: dict[str, dict[str, int]]) -> None:
    """That such calls are counted is tested in `tests/cuda/test_cuda_stub.py`."""
    for name, calls in steady.items():
        assert calls[cuda_stub.NOT_CAPTURABLE] == 0, name


@pytest.mark.parametrize("count", [1, 8])
def test_a_known_shape_allocates_nothing(steady: dict[str, dict[str, int]], count: int) -> None:
    assert steady[f"distinct scores, {count}"]["cudaMalloc"] == 0
    assert steady["first of 1"]["cudaMalloc"] > 0, "the count works"


def test_a_step_uploads_a_kilobyte_and_downloads_little_more(steady: dict[str, dict[str, int]]) -> None:
    calls = steady["distinct scores, 1"]
    opening = (
        256 + 512 + 256
    )  # top-k and log-sums of two tokens instead of three; uploads have the same size once aligned
    assert calls["bytes device to host"] == 10 * RECEIVED + opening
    prompt = 2 * 256 + 8 * (65 + 16)  # ids and mask of 16 tokens, then the mask of all encoder positions
    assert calls["bytes host to device"] == 11 * SENT + prompt
    assert calls["bytes device to device"] == 65 * 128 * 4, "the features, to the buffer that the captured graph reads"


def test_all_logits_are_downloaded_only_where_the_top_k_are_not_enough(steady: dict[str, dict[str, int]]) -> None:
    """They are not where all scores are equal; then the logits of eight prompts are downloaded together."""
    vocabulary = 4 * 1568
    assert steady["equal scores, 1"]["bytes device to host"] > 11 * vocabulary
    assert steady["equal scores, 8"]["bytes device to host"] < 11 * (8 * 3 * vocabulary + 8 * RECEIVED) * 1.1
    assert steady["distinct scores, 8"]["bytes device to host"] <= 11 * 8 * RECEIVED


def test_without_cuda_graphs_the_same_is_copied(steady: dict[str, dict[str, int]]) -> None:
    calls = run("without_graphs")
    assert calls["cudaGraphLaunch"] == calls["cudaStreamBeginCapture"] == 0
    assert calls["kernels"] > 500
    assert calls["bytes host to device"] == steady["equal scores, 1"]["bytes host to device"]
    assert calls["cudaMalloc"] == 0


def test_staying_on_the_device_saves_most_copies(steady: dict[str, dict[str, int]]) -> None:
    through_the_host = run("through_the_host")
    for direction in ("bytes host to device", "bytes device to host"):
        assert through_the_host[direction] > 20 * steady["distinct scores, 1"][direction]


def test_through_the_host_every_step_uploads_its_inputs() -> None:
    """Ids, positions, masks and KV caches at every step, and not only when buffers were bound."""
    calls = run("through_the_host")
    layers, heads, head_dim, num_encoded, capacity = 3, 4, 32, 65 + 4, 64
    of_a_step = 2 * layers * heads * head_dim * (num_encoded + capacity) * 2
    assert calls["bytes host to device"] > calls["steps"] * of_a_step


def test_a_gpu_too_small_for_the_batch_answers_with_a_smaller_one() -> None:
    found = run("full", memory=11_500_000)
    assert found["answers"] == [1, 16, 1]
    assert 1 <= found["batch_size"] < 16
    assert run("full")["batch_size"] == 16, "memory was the reason"


def test_a_full_gpu_is_a_clear_error() -> None:
    found = run("too_small", memory=8_000_000)
    for step in ("load", "run"):
        name, text = found[step]
        assert name == "DeviceMemoryError"
        assert "a smaller max_batch, fewer beams or an fp16 bundle need less" in text


def test_memory_in_use_is_near_the_estimate() -> None:
    """Everything that is allocated on the GPU, by number of prompts, against `florence_onnx.bundles.memory`."""
    for count, (in_use, estimated) in run("memory").items():
        assert 0.8 * estimated < in_use < 1.2 * estimated, count
