"""A child of a process that has used a model answers, or says why it cannot, and ends: it never waits for ever."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from florence_onnx import Florence2, forks, tasks
from tests.forked_callers import IMAGES, SAMPLE, SCENARIOS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")

GROUPS = (
    ("one thread", "two threads", "continuous batching", "continuous batching, two threads", "unused"),
    ("new model", "other device", "fal", "fal with max_batch", "fal async", "fal requests of the parent"),
    ("server", "mcp", "mcp while loading", "pool", "twice", "fal while loading"),
    ("busy, one thread",),
    ("busy, two threads", "busy, continuous batching"),
)
"""Scenarios that share a process; those that leave threads behind come last."""


def run_group(names: tuple[str, ...]) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.forked_callers", *names]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert not ended.stderr, ended.stderr[-3000:]
    return dict(zip(names, map(json.loads, ended.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the child of each scenario has found."""
    return {name: result for group in GROUPS for name, result in run_group(group).items()}


@pytest.fixture(scope="module")
def expected() -> list[str]:
    model = Florence2.from_pretrained("demo", device="cpu", session_options={"intra_op_num_threads": 1})
    return [model.run(tasks.OBJECT_DETECTION, image).text for image in (SAMPLE, *IMAGES)]


def test_every_scenario_is_in_a_group() -> None:
    assert sorted(name for group in GROUPS for name in group) == sorted(SCENARIOS)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_child_ends_by_itself(found: dict[str, Any], name: str) -> None:
    assert found[name]["exit"] == 0


@pytest.mark.parametrize(
    "name",
    [
        *("one thread", "two threads", "continuous batching", "continuous batching, two threads", "new model"),
        *("busy, one thread", "busy, two threads", "busy, continuous batching"),
    ],
)
def test_a_model_answers_in_the_child(found: dict[str, Any], expected: list[str], name: str) -> None:
    assert found[name]["answer"] == expected


def test_a_pool_of_forked_processes_answers(found: dict[str, Any], expected: list[str]) -> None:
    assert found["pool"]["answer"] == expected[1:]


def test_a_child_may_fork_too(found: dict[str, Any], expected: list[str]) -> None:
    assert found["twice"]["answer"] == {"exit": 0, "answer": expected}


def test_a_device_that_does_not_survive_a_fork_is_a_typed_error(found: dict[str, Any]) -> None:
    assert found["other device"]["error"] == "ProviderError"
    assert "after the fork" in found["other device"]["message"]
    assert "CUDAExecutionProvider" in found["other device"]["message"]


@pytest.mark.parametrize("name", ["fal", "fal with max_batch", "fal while loading", "fal async"])
def test_fal_clients_answer_in_the_child(found: dict[str, Any], name: str) -> None:
    labels = [box["label"] for box in found[name]["answer"]["results"]["bboxes"]]
    assert labels == ["green circle", "red circle", "yellow star"]


def test_requests_of_the_parent_are_answered_or_refused(found: dict[str, Any]) -> None:
    ended, status, message = found["fal requests of the parent"]["answer"]
    assert len(ended["results"]["bboxes"]) == 3
    assert status == 503
    assert "submitted before the process was forked" in message


def test_the_servers_application_answers_in_the_child(found: dict[str, Any]) -> None:
    answer = found["server"]["answer"]
    assert answer["results"] == answer["parent"]
    assert answer["ended"] == "1.0"  # its own request alone
    assert answer["stored"] == 200
    assert answer["kept"] is True  # closing a worker leaves the files of the others


@pytest.mark.parametrize("name", ["mcp", "mcp while loading"])
def test_mcp_tools_answer_in_the_child(found: dict[str, Any], name: str) -> None:
    assert len(found[name]["answer"]["results"]["bboxes"]) == 3


# ------------------------------------------------------------------------------------------------------------ gunicorn


@contextlib.contextmanager
def gunicorn() -> Iterator[str]:
    """The URL of gunicorn with `tests.preloaded_app` in one forked worker; it must end when it is told to."""
    pytest.importorskip("gunicorn", reason="pip install -e '.[test]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = ["--preload", "--workers", "1", "--bind", address, "--graceful-timeout", "60", "--timeout", "60"]
    command = [sys.executable, "-m", "gunicorn", *options, "tests.preloaded_app:app"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=Path(__file__).parent.parent)
    try:
        yield f"http://{address}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    finally:
        process.kill()


def get(url: str, deadline: float) -> bytes:
    while True:
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                return bytes(response.read())
        except ConnectionRefusedError:
            pass
        except OSError as error:
            if not isinstance(getattr(error, "reason", None), ConnectionRefusedError):
                raise
        assert time.monotonic() < deadline, "gunicorn does not listen"
        time.sleep(0.05)


def test_a_preloaded_application_answers_under_gunicorn() -> None:
    begin = time.monotonic()
    with gunicorn() as url:
        assert get(url, begin + 60) == b"true"
        assert get(url, begin + 120) == b"true"
        end = time.monotonic()
    # a worker that did not end would have been killed after the graceful timeout
    assert time.monotonic() - end < 60


# -------------------------------------------------------------------------------------------------------- registration


def test_objects_that_are_gone_are_not_called() -> None:
    class Called:
        def method(self) -> None:
            raise AssertionError

    before = len(forks._registered)
    called = Called()
    forks.call_in_child(called.method)
    assert len(forks._registered) == before + 1
    del called
    assert len(forks._registered) == before


def test_forks_are_counted() -> None:
    before = forks.count()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, str(forks.count()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(reader, 100)) == before + 1
    assert forks.count() == before
