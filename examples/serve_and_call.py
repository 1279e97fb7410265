"""Calls a server with fal's API: one that is running already, or one that this script starts and stops.

    python examples/serve_and_call.py car.jpg
    python examples/serve_and_call.py car.jpg --url http://127.0.0.1:8000 --task caption

Starting a server needs `pip install 'florence-onnx[cpu,serve]'`; the call itself needs the standard library only.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import mimetypes
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

READY_WITHIN_S = 120.0


@contextlib.contextmanager
def serve(model: str) -> Iterator[str]:
    """Runs `florence-onnx serve` on a free port of the loopback interface while the block runs.

    Yields:
        The server's URL, without a slash at the end.

    Raises:
        RuntimeError: The server ended, or was not ready in time; its log on standard error says why.
    """
    with socket.socket() as probe:  # freed before the server takes it: another process could be faster
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "florence_onnx", "serve", "--model", model, "--port", str(port)]
    # annotated images would be URLs of this server, which has stopped by the time they are printed
    process = subprocess.Popen([*command, "--images", "none", "--log-format", "text"], stdout=sys.stderr)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + READY_WITHIN_S
        while not is_ready(url):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with exit code {process.returncode}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server was not ready within {READY_WITHIN_S:g} s")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()  # SIGTERM: accepted requests are finished first
        process.wait()


def is_ready(url: str) -> bool:
    """Whether the server has loaded its model."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def data_uri(path: Path) -> str:
    """The content of an image file as a `data:` URI; the API takes `http(s)` URLs as well."""
    content_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{content_type};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def call(url: str, task: str, arguments: dict[str, Any], api_key: str | None = None) -> dict[str, Any]:
    """Calls an endpoint.

    Args:
        url: The server's URL, without a slash at the end.
        task: Name of the endpoint, such as object-detection.
        arguments: `image_url`, and `text_input` or `region` for tasks that need one.
        api_key: Key of a server that was started with `--api-key`.

    Returns:
        fal's JSON: `results`, and `image` for tasks with geometry.

    Raises:
        RuntimeError: The server refused the request; the message has its status and its answer.
    """
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Key {api_key}"
    endpoint = f"{url}/fal-ai/florence-2-large/{task}"
    request = urllib.request.Request(endpoint, json.dumps(arguments).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{endpoint}: status {error.code}: {error.read().decode(errors='replace')}") from error


def main() -> int:
    """Reads the arguments, calls the server, and prints fal's JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="image file")
    parser.add_argument("--task", default="object-detection", help="name of the endpoint (%(default)s)")
    parser.add_argument("--text", help="text_input, for tasks that need text")
    parser.add_argument("--url", help="URL of a running server; without it one is started")
    parser.add_argument("--model", default="demo", help="model of the server that is started (%(default)s)")
    arguments = parser.parse_args()

    body = {"image_url": data_uri(arguments.image)}
    if arguments.text:
        body["text_input"] = arguments.text
    api_key = os.environ.get("FLORENCE_ONNX_API_KEY")
    server = contextlib.nullcontext(arguments.url.rstrip("/")) if arguments.url else serve(arguments.model)
    with server as url:
        answer = call(url, arguments.task, body, api_key)
    print(json.dumps(answer, ensure_ascii=False, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
