"""Decoding in processes of its own: the same pixels, and an end to decoding that takes too long or is not wanted."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from florence_onnx.errors import ImageDecodeError, ImageTooLargeError
from florence_onnx.images import decoder_child
from florence_onnx.images.decoder_processes import DecoderProcesses
from florence_onnx.images.decoding import load
from florence_onnx.images.opening import DecodingEndedError
from tests import hostile_images as hostile

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the time limit is a timer of Unix")
SMALL = hostile.png(5, 4)


@pytest.fixture(scope="module")
def processes() -> Iterator[DecoderProcesses]:
    made = DecoderProcesses(2, max_pixels=50_000_000, seconds=60)
    yield made
    made.close()


def pids(processes: DecoderProcesses) -> list[int]:
    """The ids of the children that wait."""
    return [process.pid for process in processes._idle]


def slow() -> bytes:
    """Takes more than a second to decode on any machine."""
    return hostile.many_scans(7000, 32)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
def test_pixels_are_those_of_this_process(image_format: str, processes: DecoderProcesses) -> None:
    if image_format in ("WEBP", "AVIF") and not features.check(image_format.lower()):
        pytest.skip(f"needs a Pillow with {image_format}")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    content = hostile.saved(noise, image_format, exif=exif)
    here, there = load(content), processes.decode(content)
    assert (there.mode, there.size) == ("RGB", here.size)
    assert there.tobytes() == here.tobytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (hostile.EPS, "Ghostscript"), (SMALL[:40], "truncated"), (hostile.ico(SMALL), "format ICO")],
)
def test_errors_are_those_of_this_process(content: bytes, message: str, processes: DecoderProcesses) -> None:
    with pytest.raises(ImageDecodeError, match=f"the image .*{message}"):
        processes.decode(content)
    before = pids(processes)
    assert processes.decode(SMALL).size == (5, 4)
    assert pids(processes) == before  # an error of ours costs no process


def test_limits_are_passed_on(processes: DecoderProcesses) -> None:
    with pytest.raises(ImageTooLargeError, match="81,000,000 pixels, allowed are 50,000,000"):
        processes.decode(hostile.png(9000, 9000))
    with pytest.raises(ImageTooLargeError, match="a side"):
        processes.decode(hostile.png(70_000, 1))


def test_admission_comes_before_decoding(processes: DecoderProcesses) -> None:
    asked = []
    processes.decode(hostile.png(30, 20), admit=lambda peak, result: asked.append((peak, result)))
    assert asked == [(6 * 600, 4 * 600)]

    def refuse(peak: int, result: int) -> None:
        raise ImageTooLargeError("no room")

    with pytest.raises(ImageTooLargeError, match="no room"):
        processes.decode(SMALL, admit=refuse)
    assert processes.decode(SMALL).size == (5, 4)


def test_decoding_that_takes_too_long_ends() -> None:
    processes = DecoderProcesses(1, seconds=0.5)
    try:
        with pytest.raises(ImageTooLargeError, match=r"takes more than 0\.5 s to decode"):
            processes.decode(slow())
        assert pids(processes) == []
        assert processes.decode(SMALL).size == (5, 4)
    finally:
        processes.close()


def test_decoding_that_is_not_wanted_any_more_ends(processes: DecoderProcesses) -> None:
    has_begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        decoded = pool.submit(processes.decode, slow(), key="it", admit=lambda peak, result: has_begun.set())
        assert has_begun.wait(30)
        processes.end("another")
        processes.end("it")
        with pytest.raises(DecodingEndedError):
            decoded.result(30)
    processes.end("it")
    assert processes.decode(SMALL).size == (5, 4)


def test_a_decoder_that_dies_costs_one_image(processes: DecoderProcesses, caplog: pytest.LogCaptureFixture) -> None:
    processes.decode(SMALL)
    (*_, last) = pids(processes)
    with pytest.raises(ImageDecodeError, match="the decoder failed on it"):
        processes.decode(hostile.png(100, 100), admit=lambda peak, result: os.kill(last, signal.SIGSEGV))
    assert "a decoder process ended" in caplog.text
    assert processes.decode(SMALL).size == (5, 4)


def test_processes_are_bounded_and_shared(processes: DecoderProcesses) -> None:
    running, most, lock = 0, 0, threading.Lock()
    both = threading.Barrier(2)

    def count(peak: int, result: int) -> None:
        nonlocal running, most
        with lock:
            running, most = running + 1, max(most, running + 1)
        both.wait(30)
        with lock:
            running -= 1

    with ThreadPoolExecutor(6) as pool:
        sizes = list(pool.map(lambda _: processes.decode(SMALL, admit=count).size, range(6)))
    assert sizes == [(5, 4)] * 6
    assert most == 2 == len(pids(processes))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the environment in Linux's /proc")
def test_decoders_do_not_know_our_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLORENCE_ONNX_API_KEY", "id:secret")
    processes = DecoderProcesses(1)
    try:
        processes.decode(SMALL)
        (child,) = pids(processes)
        environment = Path(f"/proc/{child}/environ").read_bytes()
        assert b"PATH=" in environment and b"secret" not in environment
    finally:
        processes.close()


def test_after_close_nothing_runs() -> None:
    processes = DecoderProcesses(2)
    processes.decode(SMALL)
    (child,) = pids(processes)
    processes.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    with pytest.raises(DecodingEndedError):
        processes.decode(SMALL)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory through Linux's /proc")
def test_a_decoder_that_takes_more_memory_than_estimated_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a child whose estimate is wrong: it says 0 bytes."""
    monkeypatch.setattr(decoder_child, "SLACK_BYTES", 0)
    request = {"num_bytes": 0, "max_pixels": 10**8, "max_side": 10**5, "seconds": 0}
    content = hostile.png(4000, 4000, colour=2)
    monkeypatch.setattr("florence_onnx.images.opening._PIXEL_BYTES", {"PNG": 0})
    try:
        with pytest.raises((MemoryError, ImageDecodeError, OSError)):
            decoder_child._answer(request, content, io.BytesIO(b"{}\n"), io.BytesIO())
    finally:
        decoder_child._limit_memory(None)
