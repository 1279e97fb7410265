"""`POST …/{slug}/stream` with fal's own clients and with raw HTTP: the parts and then the result, errors, and hanging up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="pip install -e '.[test]'")
for needed in ("fastapi", "uvicorn", "prometheus_client", "pythonjsonlogger"):
    pytest.importorskip(needed, reason="pip install -e '.[serve]'")

from florence_onnx import fal, tasks  # noqa: E402
from tests.fal.test_fal import APP, SAMPLE, arguments, wait_for  # noqa: E402
from tests.fal.test_fal_clients import KEY, run_node, run_python  # noqa: E402
from tests.live_server import LiveServer, serve  # noqa: E402
from tests.server.test_server import metric  # noqa: E402

HEADERS = {"Authorization": f"Key {KEY}"}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    given = ("--images", "data", "--grace", "1", "--api-key", KEY, "--allow-options")
    with serve(*given, environment={"OMP_NUM_THREADS": "1"}) as running:
        yield running


def read(server: LiveServer, slug: str, **more: Any) -> tuple[list[dict[str, Any]], Any]:
    """The events of a stream, the last one apart."""
    asked = {**arguments(tasks.TASKS[slug]), **more}
    headers = {**HEADERS, "X-Florence-Extra": "1"}
    with httpx.stream("POST", f"{server.url}/{APP}/{slug}/stream", json=asked, headers=headers, timeout=60) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        assert len(response.headers["x-fal-request-id"]) == 36
        lines = [line for line in response.iter_lines() if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    *parts, last = [json.loads(line[6:]) for line in lines]
    return parts, last


def items(results: Any, extra: Any) -> list[Any]:
    """What the parts of a result must be."""
    if isinstance(results, str):
        return results.split(" ")
    return [*results.get("bboxes", []), *results.get("quad_boxes", []), *(results.get("polygons") or extra["polygons"])]


@pytest.mark.parametrize("slug", tasks.TASKS)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_parts_then_what_the_direct_endpoint_returns(server: LiveServer, slug: str, num_beams: int) -> None:
    parts, last = read(server, slug, num_beams=num_beams)
    asked = {**arguments(tasks.TASKS[slug]), "num_beams": num_beams}
    direct = httpx.post(
        f"{server.url}/{APP}/{slug}", json=asked, headers={**HEADERS, "X-Florence-Extra": "1"}, timeout=60
    ).json()
    assert last == direct
    assert "".join(part["text"] for part in parts if part["part"] == "text") == last["extra"]["text"]
    found = [part for part in parts if part["part"] != "text"]
    expected = items(last["results"], last["extra"])
    assert [part["index"] for part in found] == list(range(len(expected)))
    assert [part["item"].strip() if part["part"] == "word" else part["item"] for part in found] == expected
    assert [part["quad"] for part in found if part["part"] == "quad"] == last["extra"]["quads"]
    if num_beams == 1 and slug == "object-detection":
        assert parts[-1]["part"] == "text" and len(found) > 1, "boxes came before the end"


def test_an_error_before_the_first_part_has_its_status(server: LiveServer) -> None:
    for sent in ({}, {"image_url": "data:,x"}, {"image_url": "data:image/png;base64,AAAA"}):
        urls = (f"{server.url}/{APP}/caption/stream", f"{server.url}/{APP}/caption")
        streamed, direct = (httpx.post(url, json=sent, headers=HEADERS, timeout=60) for url in urls)
        assert (streamed.status_code, streamed.json()) == (direct.status_code, direct.json())
        assert streamed.status_code == 422
    assert httpx.post(f"{server.url}/{APP}/nothing/stream", json={}, headers=HEADERS).status_code == 404
    assert httpx.post(f"{server.url}/{APP}/caption/stream", json={}).status_code == 401


def test_hanging_up_ends_the_request(server: LiveServer) -> None:
    """Of an answer of 1,000 tokens: after the first part the client goes, and the request ends as cancelled."""
    with httpx.Client(base_url=server.url, headers=HEADERS, timeout=60) as client:
        before = [metric(client, f"florence_{name}_total") for name in ("batches",)]
        asked = {**arguments(tasks.OBJECT_DETECTION), "num_beams": 1, "min_new_tokens": 1000, "max_new_tokens": 1000}
        with client.stream("POST", f"/{APP}/object-detection/stream", json=asked) as response:
            assert next(response.iter_lines()).startswith("data: ")
        wait_for(lambda: metric(client, "florence_in_progress") == metric(client, "florence_queue_depth") == 0)
        assert metric(client, "florence_batches_total") == before[0] + 1
        assert client.post(f"/{APP}/caption", json=arguments(tasks.CAPTION)).status_code == 200


# ------------------------------------------------------------------------------------------------------- fal's clients

_PYTHON = """
import asyncio, json, sys, fal_client, fal_client.client as client
base, app, image = sys.argv[1:]
client.RUN_URL_FORMAT = f"{base}/"
asked = {"image_url": fal_client.encode_file(image)}
async def twin():
    return [event async for event in fal_client.stream_async(f"{app}/ocr-with-region", asked)]
print(json.dumps([list(fal_client.stream(f"{app}/object-detection", asked)), asyncio.run(twin())]))
"""

_JAVASCRIPT = """
import { readFileSync } from "node:fs";
import { createFalClient } from "@fal-ai/client";
const [base, app, image] = process.argv.slice(2);
const client = createFalClient({
  credentials: "id:secret",
  requestMiddleware: async (request) => ({ ...request, url: base + new URL(request.url).pathname }),
});
const image_url = "data:image/png;base64," + readFileSync(image).toString("base64");
const stream = await client.stream(`${app}/object-detection`, { input: { image_url } });
const events = [];
for await (const event of stream) events.push(event);
const last = await stream.done();
const wrong = await client.stream(`${app}/object-detection`, { input: {} });
const status = await wrong.done().then(() => 0, (error) => error.status);
console.log(JSON.stringify({ events, last, status }));
"""


def check(events: list[dict[str, Any]], slug: str) -> None:
    fal.configure("demo", device="cpu")
    *parts, last = events
    assert last == fal.run(f"{APP}/{slug}", arguments(tasks.TASKS[slug]))
    (found,) = last["results"].values()
    assert [part["item"] for part in parts if part["part"] != "text"] == found
    assert found


def test_the_python_client(server: LiveServer) -> None:
    pytest.importorskip("fal_client", reason="pip install fal-client")
    detected, read_text = run_python(_PYTHON, {}, server.url, APP, str(SAMPLE))
    check(detected, "object-detection")
    check(read_text, "ocr-with-region")


def test_the_javascript_client(server: LiveServer) -> None:
    found = run_node(_JAVASCRIPT, server.url, APP, str(SAMPLE))
    check(found["events"], "object-detection")
    assert found["last"] == found["events"][-1]
    assert found["status"] == 422
