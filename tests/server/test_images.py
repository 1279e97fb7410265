"""Images of strangers, sent to a real server: refused or answered, and decoded in processes that end with it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

httpx = pytest.importorskip("httpx", reason="pip install -e '.[test]'")
for needed in ("fastapi", "uvicorn", "prometheus_client", "pythonjsonlogger"):
    pytest.importorskip(needed, reason="pip install -e '.[serve]'")

from florence_onnx import fal  # noqa: E402
from tests import hostile_images as hostile  # noqa: E402
from tests.fal.test_fal import APP, wait_for  # noqa: E402
from tests.live_server import serve  # noqa: E402

LOAD, LARGE = "image_load_error", "image_too_large"
HOSTILE: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "IPTC around an EPS": (lambda: hostile.iptc(hostile.EPS), LOAD, "would run Ghostscript"),
    "IPTC around a PNG": (lambda: hostile.iptc(hostile.png(9000, 9000)), LOAD, "of format IPTC"),
    "ICO": (lambda: hostile.ico(hostile.png(9, 9)), LOAD, "convert it to PNG"),
    "EPS of comments": (lambda: hostile.EPS[:60] + b"%x\n" * 500_000, LOAD, "would run Ghostscript"),
    "many scans": (lambda: hostile.many_scans(500, 150), LARGE, "more than 32 scans"),
    "one row": (lambda: hostile.png(50_000_000, 1), LARGE, "a side"),
    "many pixels": (lambda: hostile.png(9000, 9000), LARGE, "allowed are 50,000,000"),
    "huge tile": (lambda: hostile.huge_tile(3000), LARGE, "tiles of 3000 x 3000"),
    "shared tags": (lambda: hostile.shared_tags(100, 100_000), LOAD, "tags share their values"),
}
GOOD = {
    "text": lambda: hostile.with_chunks(hostile.png(64, 48), hostile.compressed_text(3_000_000)),
    "profile": lambda: hostile.with_chunks(hostile.png(64, 48), hostile.colour_profile(3_000_000)),
    "16 bits": lambda: hostile.png(640, 480, depth=16),
}


def children(pid: int) -> list[int]:
    return [int(child) for each in Path(f"/proc/{pid}/task").glob("*/children") for child in each.read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at processes in Linux's /proc")
def test_hostile_images_to_a_server() -> None:
    """One server for all of them, as each has to be followed by an answer to somebody else."""
    with serve("--images", "none", "--grace", "1", environment={"OMP_NUM_THREADS": "1"}) as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:

            def send(content: bytes) -> tuple[int, dict[str, object]]:
                response = client.post(f"/{APP}/caption", json={"image_url": fal.encode(content, "image/x")})
                return response.status_code, response.json()

            for name, (make, kind, message) in HOSTILE.items():
                status, body = send(make())
                (problem,) = body["detail"]  # type: ignore[misc]
                assert (name, status, problem["type"]) == (name, 422, kind)
                assert message in problem["msg"], name
            for name, make in GOOD.items():
                assert (name, send(make())[0]) == (name, 200)

            decoders = children(server.process.pid)
            assert 1 <= len(decoders) <= 4
            for decoder in decoders:
                os.kill(decoder, signal.SIGKILL)
            wait_for(lambda: not any(map(is_running, decoders)))
            assert send(hostile.png(64, 50))[0] == 200
            decoders = children(server.process.pid)
            assert decoders
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(15) == 0
    end = time.monotonic() + 10
    while any(map(is_running, decoders)) and time.monotonic() < end:
        time.sleep(0.01)
    assert [decoder for decoder in decoders if is_running(decoder)] == []
