"""Processes that fork after they have used a model: `python -m tests.forked_callers SCENARIO…` prints JSON lines.

A scenario is a function that prepares something in the parent and returns what is to be called in the child. The child
ends by `sys.exit`, like a worker of gunicorn: that it can is part of what is shown. The parent kills a child that does
not end by itself.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from florence_onnx import Florence2, FlorenceError, fal, tasks

SAMPLES = Path(tasks.__file__).parent / "demo" / "samples"
SAMPLE = str(SAMPLES / "scene-1.png")
IMAGES = [str(path) for path in sorted(SAMPLES.glob("*.png"))[:2]]
CHILD_SECONDS = 60
APPLICATION = "fal-ai/florence-2-large/object-detection"
Call = Callable[[], Any]


@functools.cache
def load(threads: int = 1, max_batch: int = 0) -> Florence2:
    """The demo model on the CPU."""
    return Florence2.from_pretrained(
        "demo", device="cpu", session_options={"intra_op_num_threads": threads}, max_batch=max_batch
    )


def ask(model: Florence2) -> list[str]:
    """The answers of a single request and of a batch."""
    answers = [model.run(tasks.OBJECT_DETECTION, SAMPLE), *model.run_batch(tasks.OBJECT_DETECTION, IMAGES)]
    return [answer.text for answer in answers]


def used(threads: int, max_batch: int = 0) -> Call:
    """A model that the parent has used."""
    model = load(threads, max_batch)
    ask(model)
    return lambda: ask(model)


def busy(threads: int, max_batch: int = 0) -> Call:
    """A model that another thread of the parent is running at the fork, as on a web server under load."""
    model = load(threads, max_batch)

    def work() -> None:
        while True:
            model.run_batch(tasks.OBJECT_DETECTION, IMAGES)

    for _ in range(2):
        threading.Thread(target=work, daemon=True).start()
    time.sleep(0.3)
    return lambda: ask(model)


def unused() -> Call:
    """A model with threads that the child does not use."""
    model = load(2)
    ask(model)
    return lambda: ["not used"]


def new_model() -> Call:
    """A child that loads a model of its own."""
    model = load(2)
    ask(model)
    return lambda: ask(load.__wrapped__(2))


def other_device() -> Call:
    """A model that says that it is on a GPU; there is none here, and what is tried is that the child does not touch it."""
    model = load.__wrapped__()
    ask(model)
    for engine in (model._vision_encoder, *vars(model._text_model).values()):
        if hasattr(engine, "provider"):
            engine.provider = "CUDAExecutionProvider"
    return lambda: ask(model)


def _configure(**settings: Any) -> None:
    fal.configure("demo", device="cpu", images=False, session_options={"intra_op_num_threads": 2}, **settings)


def _fal_answer() -> Any:
    return fal.run(APPLICATION, {"image_url": fal.encode_file(SAMPLE)})


def fal_client() -> Call:
    """fal's client in the process."""
    _configure()
    _fal_answer()
    return _fal_answer


def fal_client_with_max_batch() -> Call:
    """fal's client in front of continuous batching."""
    _configure(max_batch=4)
    _fal_answer()
    return _fal_answer


def fal_client_while_loading() -> Call:
    """A fork while another thread holds the client's lock, as it does while it loads the model."""
    _configure()
    is_held = threading.Event()

    def hold() -> None:
        with fal._sync_client._lock, fal._configuration.lock:
            is_held.set()
            time.sleep(600)

    threading.Thread(target=hold, daemon=True).start()
    is_held.wait()
    return _fal_answer


def fal_async_client() -> Call:
    """fal's async client, in an event loop of each process."""

    def run() -> Any:
        return asyncio.run(fal.run_async(APPLICATION, {"image_url": fal.encode_file(SAMPLE)}))

    _configure()
    run()
    return run


def fal_requests_of_the_parent() -> Call:
    """A request that had ended before the fork, and one that is never answered, because no thread is there to."""
    _configure()
    ended = fal.submit(APPLICATION, {"image_url": fal.encode_file(SAMPLE)})
    ended.get()
    service = fal._sync_client.service
    service.settings = service.settings.__class__(max_loaded=0)  # from now on no image is loaded
    waiting = fal.submit(APPLICATION, {"image_url": fal.encode_file(SAMPLE)})

    def look() -> Any:
        try:
            waiting.get()
        except fal.FalClientHTTPError as error:
            return [ended.get(), error.status_code, error.message]
        return "answered"

    return look


def server() -> Call:
    """The server's application, made before the fork as under gunicorn's `preload_app`."""
    from starlette.testclient import TestClient

    from florence_onnx.server.app import create_app
    from florence_onnx.server.context import ServerContext
    from florence_onnx.server.settings import ServerSettings

    context = ServerContext(load(2), ServerSettings())
    app = create_app(context)

    def post() -> Any:
        client = TestClient(app, base_url="http://127.0.0.1")
        body = client.post(f"/{APPLICATION}", json={"image_url": fal.encode_file(SAMPLE)}).json()
        metrics = client.get("/metrics").text
        (number,) = [line for line in metrics.splitlines() if line.startswith('florence_ended_total{how="answered"}')]
        stored = client.get(body["image"]["url"]).status_code
        is_stored_after_close = _close_files(context)
        return {
            "results": body["results"],
            "ended": number.split()[-1],
            "stored": stored,
            "kept": is_stored_after_close,
        }

    post_in_parent = post()
    return lambda: {**post(), "parent": post_in_parent["results"]}


def _close_files(context: Any) -> bool:
    """Whether the folder of stored files is still there after a child has closed its server."""
    if multiprocessing.parent_process() is None and os.getpid() == PARENT:
        return True
    context.files.close()
    return bool(context.files.folder.is_dir())


def mcp() -> Call:
    """The MCP server's tools, with the model loaded."""
    return _mcp(is_loaded=True)


def mcp_while_loading() -> Call:
    """The MCP server's tools, with a thread of the parent that has just begun to load the model."""
    return _mcp(is_loaded=False)


def _mcp(*, is_loaded: bool) -> Call:
    from florence_onnx.mcp_server.tools import Images, make_server

    def load_in_parent() -> Florence2:
        if not is_loaded and os.getpid() == PARENT:
            time.sleep(600)
        return load(2)

    made = make_server(load_in_parent, Images())

    async def call() -> Any:
        result = await made.call_tool("object-detection", {"image": SAMPLE})
        return result.structured_content

    if is_loaded:
        asyncio.run(call())
    else:
        threading.Thread(target=lambda: asyncio.run(call()), daemon=True).start()
        time.sleep(0.3)
    return lambda: asyncio.run(call())


_model: Florence2 | None = None


def _ask_global(image: str) -> str:
    assert _model is not None
    return _model.run(tasks.OBJECT_DETECTION, image).text


def pool() -> Call:
    """A pool of multiprocessing's fork context, whose processes take the model from a global variable."""
    global _model
    _model = load(2)
    ask(_model)

    def run() -> list[str]:
        with multiprocessing.get_context("fork").Pool(2) as processes:
            return processes.map_async(_ask_global, IMAGES).get(CHILD_SECONDS - 10)

    return run


def twice() -> Call:
    """A child that forks in its turn."""
    model = load(2, max_batch=2)
    ask(model)

    def run() -> Any:
        ask(model)
        return in_child(lambda: ask(model))

    return run


SCENARIOS: dict[str, Callable[[], Call]] = {
    "one thread": lambda: used(1),
    "two threads": lambda: used(2),
    "continuous batching": lambda: used(1, 4),
    "continuous batching, two threads": lambda: used(2, 4),
    "busy, one thread": lambda: busy(1),
    "busy, two threads": lambda: busy(2),
    "busy, continuous batching": lambda: busy(1, 4),
    "unused": unused,
    "new model": new_model,
    "other device": other_device,
    "fal": fal_client,
    "fal with max_batch": fal_client_with_max_batch,
    "fal while loading": fal_client_while_loading,
    "fal async": fal_async_client,
    "fal requests of the parent": fal_requests_of_the_parent,
    "server": server,
    "mcp": mcp,
    "mcp while loading": mcp_while_loading,
    "pool": pool,
    "twice": twice,
}
PARENT = os.getpid()


def in_child(function: Call) -> dict[str, Any]:
    """Forks, and returns what the child has found, and how it ended: `exit` is None for one that had to be killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        try:
            found = {"answer": function()}
        except FlorenceError as error:
            found = {"error": type(error).__name__, "message": str(error)}
        os.write(writer, json.dumps(found).encode())
        os.close(writer)
        sys.exit(0)
    os.close(writer)
    deadline = time.monotonic() + CHILD_SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return {"exit": os.waitstatus_to_exitcode(status), **json.loads(os.read(reader, 2**20) or b"{}")}
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return {"exit": None}


def main() -> None:
    """Runs the scenarios that are named, and prints what the child of each has found."""
    logging.disable(logging.WARNING)
    for name in sys.argv[1:]:
        print(json.dumps(in_child(SCENARIOS[name]())), flush=True)
    os._exit(0)  # threads that hold locks on purpose need not end


if __name__ == "__main__":
    main()
