"""A real server on loopback, over HTTP: fal's protocol, limits, security and shutdown."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="pip install -e '.[test]'")
for needed in ("fastapi", "uvicorn", "prometheus_client", "pythonjsonlogger"):
    pytest.importorskip(needed, reason="pip install -e '.[serve]'")

from florence_onnx import fal, tasks  # noqa: E402
from florence_onnx.server import openapi  # noqa: E402
from tests.fal.test_fal import APP, REGION, SAMPLE, SAMPLES, arguments, wait_for  # noqa: E402
from tests.live_server import LiveServer, serve  # noqa: E402

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
CAPTION = {"results": "Two circles, a star and the word ROCKET."}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serve("--images", "data", "--grace", "1", environment=ONE_THREAD) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[Any]:
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def guarded() -> Iterator[LiveServer]:
    with serve(
        "--grace", "1", "--api-key", "id:secret", "--allow-origin", "https://app.example", environment=ONE_THREAD
    ) as running:
        yield running


def metric(client: Any, name: str, **labels: str) -> float:
    """The value of a metric, summed over the labels that are not given."""
    found = 0.0
    for line in client.get("/metrics").text.splitlines():
        match = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
        if match and match[1] == name and all(f'{key}="{value}"' in (match[2] or "") for key, value in labels.items()):
            found += float(match[3])
    return found


# ------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("task", tasks.TASKS.values(), ids=lambda task: task.slug)
def test_the_same_json_as_in_process(task: tasks.Task[Any], client: Any) -> None:
    fal.configure("demo", device="cpu")
    response = client.post(f"/{APP}/{task.slug}", json=arguments(task))
    assert response.status_code == 200, response.text
    assert response.json() == fal.run(f"{APP}/{task.slug}", arguments(task))


@pytest.mark.parametrize(
    "sent", [{}, {"image_url": "nope"}, {"image_url": "data:,x"}, {"image_url": "x", "region": {**REGION, "x1": 1000}}]
)
def test_the_same_errors_as_in_process(sent: dict[str, Any], client: Any) -> None:
    fal.configure("demo", device="cpu")
    response = client.post(f"/{APP}/region-to-category", json=sent)
    with pytest.raises(fal.FalClientHTTPError) as caught:
        fal.run(f"{APP}/region-to-category", sent)
    assert (response.status_code, response.json()) == (caught.value.status_code, caught.value.response.json())


def test_stages_and_extras(client: Any) -> None:
    asked = arguments(tasks.OCR_WITH_REGION, SAMPLES / "scene-3.png")
    response = client.post(f"/{APP}/ocr-with-region", json=asked, headers={"X-Florence-Extra": "1"})
    stages = dict(re.findall(r"(\w+);dur=([\d.]+)", response.headers["server-timing"]))
    assert set(stages) == {"queue", "load", "vision", "decode", "draw"}
    assert response.headers["x-fal-request-id"]
    body = response.json()
    assert [len(quad) for quad in body["extra"]["quads"]] == [4] * len(body["results"]["quad_boxes"])
    assert body["extra"]["text"].startswith("</s><s>")
    assert set(client.post(f"/{APP}/ocr-with-region", json=asked).json()) == {"results", "image"}


def test_annotated_images_have_absolute_urls(guarded: LiveServer) -> None:
    headers = {"Authorization": "Key id:secret"}
    response = httpx.post(
        f"{guarded.url}/{APP}/object-detection", json=arguments(tasks.OBJECT_DETECTION), headers=headers
    )
    image = response.json()["image"]
    assert image["url"].startswith(f"{guarded.url}/files/")
    served = httpx.get(image["url"])  # the browser sends no key for an <img>
    assert served.headers["content-type"] == image["content_type"] == "image/png"
    assert len(served.content) == image["file_size"]
    assert "sandbox" in served.headers["content-security-policy"]


# --------------------------------------------------------------------------------------------------------------- queue


def test_the_queue_from_submit_to_result(client: Any, server: LiveServer) -> None:
    submitted = client.post(f"/queue/{APP}/caption", json=arguments(tasks.CAPTION)).json()
    assert list(submitted) == ["status", "request_id", "response_url", "status_url", "cancel_url", "queue_position"]
    assert submitted["status"] == "IN_QUEUE"
    base = f"{server.url}/queue/{APP}/requests/{submitted['request_id']}"
    assert [submitted[name] for name in ("response_url", "status_url", "cancel_url")] == [
        base,
        f"{base}/status",
        f"{base}/cancel",
    ]
    wait_for(lambda: client.get(base + "/status").status_code == 200)
    status = client.get(base + "/status", params={"logs": 1}).json()
    assert (status["status"], status["logs"][0]["message"]) == ("COMPLETED", "started")
    assert status["metrics"]["inference_time"] > 0
    assert client.get(base + "/status").json()["logs"] is None
    assert client.get(base).json() == CAPTION
    with_task = base.replace("/requests/", "/caption/requests/")
    assert client.get(with_task).json() == CAPTION
    cancelled = client.put(base + "/cancel")
    assert (cancelled.status_code, cancelled.json()["status"]) == (400, "ALREADY_COMPLETED")


def test_a_failed_request_fails_when_its_result_is_fetched(client: Any) -> None:
    submitted = client.post(f"/queue/{APP}/caption", json={})
    assert submitted.status_code == 200
    base = submitted.json()["response_url"]
    status = client.get(base + "/status")
    assert status.status_code == 200
    assert "Field required" in status.json()["error"]
    result = client.get(base)
    assert (result.status_code, result.json()["detail"][0]["loc"]) == (422, ["body", "image_url"])


def test_the_status_stream_ends_with_completed(client: Any) -> None:
    submitted = client.post(f"/queue/{APP}/caption", json=arguments(tasks.CAPTION, SAMPLES / "scene-5.png")).json()
    with client.stream("GET", submitted["status_url"] + "/stream", params={"logs": "true"}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[5:]) for line in response.iter_lines() if line.startswith("data:")]
    states = [event["status"] for event in events]
    assert states == sorted(states, key=["IN_QUEUE", "IN_PROGRESS", "COMPLETED"].index)
    assert states[-1] == "COMPLETED"
    assert events[-1]["logs"]


def test_unknown_requests_and_early_results(client: Any) -> None:
    base = f"/queue/{APP}/requests/no-such-id"
    for response in (
        client.get(base),
        client.get(base + "/status"),
        client.get(base + "/status/stream"),
        client.put(base + "/cancel"),
    ):
        assert (response.status_code, response.json()) == (404, {"detail": "Request no-such-id not found"})


def test_by_host_and_by_proxy_header(client: Any) -> None:
    by_host = client.post(f"/{APP}/caption", json=arguments(tasks.CAPTION), headers={"Host": "queue.localhost"})
    assert by_host.json()["status"] == "IN_QUEUE"
    assert by_host.json()["response_url"].startswith("http://queue.localhost/queue/")
    for path in ("/proxy", "/api/fal/proxy"):
        target = {"x-fal-target-url": f"https://fal.run/{APP}/caption"}
        assert client.post(path, json=arguments(tasks.CAPTION), headers=target).json() == CAPTION
    target = {"x-fal-target-url": f"https://queue.fal.run/{APP}/caption"}
    submitted = client.post("/proxy", json=arguments(tasks.CAPTION), headers=target).json()
    status = f"https://queue.fal.run/{APP}/requests/{submitted['request_id']}/status?logs=1"
    wait_for(lambda: client.get("/proxy", headers={"x-fal-target-url": status}).json()["status"] == "COMPLETED")
    assert client.get("/proxy", headers={"x-fal-target-url": status}).json()["logs"]
    assert client.post("/proxy", headers={"x-fal-target-url": "ftp://x"}).status_code == 400


# ------------------------------------------------------------------------------------------------------------- uploads


def test_both_ways_of_uploading(client: Any) -> None:
    content = SAMPLE.read_bytes()
    token = client.post("/storage/auth/token?storage_type=fal-cdn-v3", json={}).json()
    headers = {
        "Authorization": f"{token['token_type']} {token['token']}",
        "X-Fal-File-Name": "../a b.png",
        "Content-Type": "image/png",
    }
    whole = client.post(token["base_url"] + "/files/upload", content=content, headers=headers).json()["access_url"]
    assert whole.endswith("/a-b.png")
    announced = client.post(
        "/storage/upload/initiate?storage_type=gcs", json={"file_name": "scene.png", "content_type": "image/png"}
    ).json()
    assert client.put(announced["upload_url"], content=content).status_code == 200
    assert client.put(announced["upload_url"], content=content).status_code == 404  # once
    for address in (whole, announced["file_url"]):
        assert client.get(address).content == content
        assert client.post(f"/{APP}/caption", json={"image_url": address}).json() == CAPTION


def test_an_uploaded_page_is_served_as_a_download(client: Any) -> None:
    headers = {"X-Fal-File-Name": "x.html", "Content-Type": "text/html"}
    address = client.post("/files/upload", content=b"<script>alert(1)</script>", headers=headers).json()["access_url"]
    served = client.get(address)
    assert served.headers["content-type"] == "application/octet-stream"
    assert served.headers["content-disposition"].startswith("attachment")
    assert served.headers["x-content-type-options"] == "nosniff"


# -------------------------------------------------------------------------------------------------------------- safety


def test_keys(guarded: LiveServer) -> None:
    url = f"{guarded.url}/{APP}/caption"
    asked = arguments(tasks.CAPTION)
    assert httpx.post(url, json=asked, headers={"Authorization": "Key id:secret"}).json() == CAPTION
    for wrong, detail in (
        ({}, "Invalid Key Authorization header format"),
        ({"Authorization": "Key"}, "Invalid Key Authorization header format"),
        ({"Authorization": "Bearer id:secret"}, "Invalid Key Authorization header format"),
        ({"Authorization": "Key id:secre"}, "No user found for Key ID and Secret"),
        ({"Authorization": "Key ïd:secret".encode("latin-1")}, "No user found for Key ID and Secret"),
    ):
        response = httpx.post(url, json=asked, headers=wrong)
        assert response.status_code == 401
        assert detail in response.json()["detail"]
    for path in ("/metrics", f"/queue/{APP}/requests/x", "/storage/auth/token"):
        assert httpx.get(guarded.url + path).status_code == 401
    for path in ("/", "/health", "/ready", "/openapi.json", "/playground/config.json"):
        assert httpx.get(guarded.url + path).status_code == 200, path
    assert httpx.post(f"{guarded.url}/files/upload", content=b"x").status_code == 401
    assert httpx.post(f"{guarded.url}/storage/upload/initiate", json={}).status_code == 401
    assert httpx.put(f"{guarded.url}/storage/upload/guessed", content=b"x").status_code == 404
    token = httpx.post(f"{guarded.url}/storage/auth/token", headers={"Authorization": "Key id:secret"}).json()["token"]
    assert (
        httpx.post(
            f"{guarded.url}/files/upload", content=b"x", headers={"Authorization": f"Bearer {token}"}
        ).status_code
        == 200
    )
    assert "id:secret" not in guarded.stderr


def test_pages_of_other_origins(guarded: LiveServer, client: Any) -> None:
    asked = {"json": arguments(tasks.CAPTION)}
    assert client.post(f"/{APP}/caption", **asked, headers={"Origin": "https://evil.example"}).status_code == 403
    assert client.post(f"/{APP}/caption", **asked, headers={"Origin": str(client.base_url)}).status_code == 200
    url, headers = f"{guarded.url}/{APP}/caption", {"Origin": "https://app.example"}
    preflight = httpx.options(url, headers={**headers, "Access-Control-Request-Method": "POST"})
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    allowed = httpx.post(url, **asked, headers={**headers, "Authorization": "Key id:secret"})
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://app.example")


def test_other_names_for_a_loopback_server_are_refused(client: Any) -> None:
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example"):
        assert client.get("/health", headers={"Host": host}).status_code == 400
    for host in ("localhost:1", "queue.localhost", "fal.run"):
        assert client.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:{port}/health",
        "http://localhost:{port}/",
        "http://169.254.169.254/latest",
        "http://[::1]/",
        "file:///etc/passwd",
    ],
)
def test_private_addresses_are_not_fetched(address: str, client: Any, server: LiveServer) -> None:
    response = client.post(f"/{APP}/caption", json={"image_url": address.format(port=server.port)})
    assert response.status_code == 422
    assert response.json()["detail"][0]["type"] == "file_download_error"


def test_bodies(client: Any, server: LiveServer) -> None:
    url = f"/{APP}/caption"
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"image_url": 1e999999}', b"1" * 5000):
        response = client.post(url, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 422, (content[:10], response.text)
    head = f"POST {url} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    assert raw(server, head + "Content-Length: 99999999999\r\n\r\n").startswith(b"HTTP/1.1 413")
    chunk = b"%x\r\n" % 2**20 + b"x" * 2**20 + b"\r\n"
    with socket.create_connection((server.host, server.port)) as connection:
        connection.sendall((head + "Transfer-Encoding: chunked\r\n\r\n").encode())
        with pytest.raises(OSError):  # the server closes the connection long before 200 MiB
            for _ in range(200):
                connection.sendall(chunk)


def raw(server: LiveServer, text: str) -> bytes:
    """Sends bytes to a server and returns the first 1000 of its response."""
    with socket.create_connection((server.host, server.port), timeout=30) as connection:
        connection.sendall(text.encode())
        return connection.recv(1000)


def test_errors_have_fals_form(client: Any) -> None:
    unknown = client.get("/no/such/path")
    assert (unknown.status_code, unknown.json()) == (404, {"detail": "Path /no/such/path not found"})
    assert client.post(f"/{APP}/no-such-task", json={}).status_code == 404
    wrong_method = client.get(f"/{APP}/caption")
    assert (wrong_method.status_code, wrong_method.json()) == (405, {"detail": "Method Not Allowed"})
    for headers in (
        {"X-Fal-Request-Timeout": "soon"},
        {"X-Fal-Request-Timeout": "-1"},
        {"X-Fal-Request-Timeout": "nan"},
    ):
        assert client.post(f"/{APP}/caption", json={}, headers=headers).status_code == 400
    assert client.post(f"/queue/{APP}/caption?fal_webhook=http://x", json={}).status_code == 400
    assert client.get("/playground/..%2f..%2fcli.py").status_code == 404


def test_a_decompression_bomb_is_refused(client: Any) -> None:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    response = client.post(f"/{APP}/caption", json={"image_url": fal.encode(buffer.getvalue(), "image/png")})
    assert (response.status_code, response.json()["detail"][0]["type"]) == (422, "image_too_large")


# ----------------------------------------------------------------------------------------------------------- under load


def test_a_full_queue_answers_429_and_a_limit_504() -> None:
    with (
        serve("--max-waiting", "2", "--max-batch", "1", environment=ONE_THREAD) as small,
        httpx.Client(timeout=60) as client,
    ):
        url = f"{small.url}/{APP}/more-detailed-caption"
        bodies = [arguments(tasks.MORE_DETAILED_CAPTION, SAMPLES / f"scene-{n % 8 + 1}.png") for n in range(24)]

        def ask(body: dict[str, Any], timeout: str) -> Any:
            return client.post(url, json=body, headers={"X-Fal-Request-Timeout": timeout})

        with ThreadPoolExecutor(24) as pool:
            responses = list(pool.map(ask, bodies, ["60"] * 24))
            statuses = {response.status_code for response in responses}
            assert statuses == {200, 429}
            busy = next(response for response in responses if response.status_code == 429)
            assert busy.json()["error_type"] == busy.headers["x-fal-error-type"] == "concurrent_requests_limit"
            assert busy.headers["retry-after"]
            late = [response for response in pool.map(ask, bodies, ["0.001"] * 24) if response.status_code == 504]
        assert late
        assert late[0].json() == {"detail": "Request timed out", "error_type": "request_timeout"}
        assert late[0].headers["x-fal-request-timeout-type"] == "user"


def test_a_client_that_never_finishes_its_request_does_not_keep_the_server_alive() -> None:
    with (
        serve("--grace", "1", environment=ONE_THREAD) as running,
        socket.create_connection((running.host, running.port)) as connection,
    ):
        connection.sendall(f"POST /{APP}/caption HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{{".encode())
        wait_for(lambda: httpx.get(f"{running.url}/ready").status_code == 200)
        running.process.terminate()
        assert running.process.wait(20) == 0


def test_the_request_of_a_client_that_disconnects_is_cancelled(client: Any, server: LiveServer) -> None:
    body = json.dumps(arguments(tasks.MORE_DETAILED_CAPTION)).encode()
    head = f"POST /{APP}/more-detailed-caption HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    before = metric(client, "florence_requests_total", status="499")
    for _ in range(20):
        with socket.create_connection((server.host, server.port)) as connection:
            connection.sendall(head.encode() + body)
    wait_for(lambda: metric(client, "florence_requests_total", status="499") > before)
    wait_for(lambda: metric(client, "florence_queue_depth") == metric(client, "florence_in_progress") == 0)
    assert client.post(f"/{APP}/caption", json=arguments(tasks.CAPTION)).json() == CAPTION


def test_waiting_requests_share_a_batch(client: Any) -> None:
    before = metric(client, "florence_batches_total"), metric(client, "florence_stage_seconds_count", stage="decode")
    slugs = ["caption", "ocr", "object-detection", "region-proposal"] * 6
    with ThreadPoolExecutor(24) as pool:
        answers = list(
            pool.map(lambda slug: client.post(f"/{APP}/{slug}", json=arguments(tasks.TASKS[slug])).json(), slugs)
        )
    assert answers[0] == CAPTION
    assert all(answer == answers[index % 4] for index, answer in enumerate(answers))
    batches = metric(client, "florence_batches_total") - before[0]
    answered = metric(client, "florence_stage_seconds_count", stage="decode") - before[1]
    assert answered == 24
    assert batches < answered


def test_terminating_under_load_loses_nothing() -> None:
    with serve("--grace", "20", environment=ONE_THREAD) as running, httpx.Client(timeout=60) as client:
        submitted = [
            client.post(f"{running.url}/queue/{APP}/caption", json=arguments(tasks.CAPTION)).json() for _ in range(5)
        ]
        outcomes: list[int] = []
        is_over = threading.Event()

        def ask() -> None:
            with httpx.Client(timeout=60) as own:
                while not is_over.is_set():
                    try:
                        response = own.post(f"{running.url}/{APP}/caption", json=arguments(tasks.CAPTION))
                    except httpx.ConnectError:
                        return  # not accepted: the server has exited
                    outcomes.append(response.status_code)
                    if response.status_code == 200:
                        assert response.json() == CAPTION
                    else:
                        return

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(outcomes) > 20)
        running.process.terminate()
        for thread in threads:
            thread.join(60)
        is_over.set()
        assert set(outcomes) == {200, 503}
        assert client.get(f"{running.url}/ready").status_code == 503
        assert [client.get(each["response_url"]).json() for each in submitted] == [CAPTION] * 5
        assert running.process.wait(20) == 0
        assert "finishing accepted requests" in running.stderr
        assert "Traceback" not in running.stderr


# ----------------------------------------------------------------------------------------------------------- operations


def test_the_openapi_document_has_fals_titles_and_order(client: Any) -> None:
    document = client.get("/openapi.json").json()
    assert document == json.loads(json.dumps(openapi.document()))
    schemas = document["components"]["schemas"]
    assert schemas["Region"]["properties"]["x1"] == {
        "type": "integer",
        "minimum": 0,
        "maximum": 999,
        "description": "X-coordinate of the top-left corner",
    }
    assert schemas["Region"]["x-fal-order-properties"] == ["x1", "y1", "x2", "y2"]
    assert schemas["BoundingBox"]["x-fal-order-properties"] == ["x", "y", "w", "h", "label"]
    assert schemas["PolygonOutputWithLabels"]["required"] == ["results"]
    for task in tasks.TASKS.values():
        post = document["paths"][f"/{APP}/{task.slug}"]["post"]
        title = post["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        answer = client.post(f"/{APP}/{task.slug}", json=arguments(task)).json()
        assert list(answer) == schemas[title]["x-fal-order-properties"], task.slug


def test_the_page_knows_the_model_by_name(client: Any) -> None:
    config = client.get("/playground/config.json").json()
    assert (config["model"], config["auth"], len(config["tasks"])) == ("demo", False, 15)
    for sample in config["samples"]:
        assert client.get("/" + sample["url"]).headers["content-type"] == "image/png"


def test_health_metrics_and_logs(client: Any, server: LiveServer) -> None:
    assert client.get("/health").json()["status"] == "ok"
    assert client.get("/ready").json() == {"status": "ready", "storage": "ok"}
    response = client.post(f"/{APP}/caption", json=arguments(tasks.CAPTION))
    assert metric(client, "florence_requests_total", endpoint="caption", status="200") > 0
    assert metric(client, "florence_stage_seconds_count", stage="vision") > 0
    assert metric(client, "florence_batch_size_count") > 0
    client.get("/" + "x" * 300)
    assert metric(client, "florence_requests_total", endpoint="unknown", status="404") > 0

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in server.stderr.splitlines() if line.startswith("{")]

    wait_for(lambda: any(line.get("path", "").startswith("/xxx") for line in lines()))
    answered = next(
        line for line in reversed(lines()) if line.get("path") == f"/{APP}/caption" and line["status"] == 200
    )
    assert answered["level"] == "INFO"
    assert answered["milliseconds"] > 0
    assert set(answered["stages"]) >= {"vision", "decode"}
    assert response.headers["x-fal-request-id"]


@pytest.mark.parametrize(
    ("arguments_given", "message"),
    [
        (["--images", "jpeg"], "--images must be one of url, data, none"),
        (["--api-key", " "], "the API key is blank; omit it"),
        (["--certificate", "x.pem"], "both a certificate and its private key"),
        (["--public-url", "example.com"], "must start with http"),
        (["--log-format", "xml"], "must be one of json, text"),
        (["--allow-host", "http://x"], "http://x"),
    ],
)
def test_bad_options_end_the_command(arguments_given: list[str], message: str) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "florence_onnx", "serve", *arguments_given]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_lone_request_is_not_held_back_to_fill_a_batch(client: Any) -> None:
    body = arguments(tasks.CAPTION)
    client.post(f"/{APP}/caption", json=body)
    before = metric(client, "florence_stage_seconds_sum", stage="queue"), time.monotonic()
    for _ in range(5):
        assert client.post(f"/{APP}/caption", json=body).json() == CAPTION
    waited = metric(client, "florence_stage_seconds_sum", stage="queue") - before[0]
    assert waited < (time.monotonic() - before[1]) / 2
