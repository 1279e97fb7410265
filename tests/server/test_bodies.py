"""Bodies of strangers: what they cost, and what they are answered. Counts, bytes and statuses; never durations."""

from __future__ import annotations

import base64
import io
import json
import random
import socket
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

httpx = pytest.importorskip("httpx", reason="pip install -e '.[test]'")
for needed in ("fastapi", "uvicorn", "prometheus_client", "pythonjsonlogger"):
    pytest.importorskip(needed, reason="pip install -e '.[serve]'")

from florence_onnx import Florence2, TextInputError, fal, tasks  # noqa: E402
from florence_onnx.fal import contract  # noqa: E402
from florence_onnx.fal.contract import TooLong  # noqa: E402
from florence_onnx.fal.problems import RequestError  # noqa: E402
from florence_onnx.server import bodies  # noqa: E402
from tests.fal.test_fal import APP, SAMPLE, arguments, wait_for  # noqa: E402
from tests.live_server import LiveServer, serve  # noqa: E402

MB = 1_000_000
URI = b'{"image_url":"data:image/png;base64,'
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serve("--grace", "0", "--cache-mb", "0", environment=ONE_THREAD) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[Any]:
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def model() -> Florence2:
    return Florence2.from_pretrained("demo", device="cpu", session_options={"intra_op_num_threads": 1})


def peak_mb(server: LiveServer) -> float:
    """The most memory that the server's process has had since `reset_peak`."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000


def reset_peak(server: LiveServer) -> None:
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")


# ------------------------------------------------------------------------------------------------------------- parsing


def test_every_body_is_what_json_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long strings are cut out and put back: on small limits, so that every way is taken."""
    for name, value in {"_SLICE": 16, "MAX_SMALL": 10, "MAX_STRING": 1000}.items():
        monkeypatch.setattr(bodies, name, value)
    rng = random.Random(13)
    pieces = (
        ("a", "\\n", "\\\\", '\\"', "\\u0041", "\\/"),
        ("ab", "c,[{"),
        ("\\\\", "x"),
        ("a", "\t", "\\"),
        ("=", "+/"),
    )
    outcomes = set()
    for _ in range(3000):
        chosen = rng.choice(pieces)
        text, content = ("".join(rng.choices(chosen, k=rng.randrange(60))) for _ in range(2))
        body = f'{{"text_input":"{text}" , "image_url": "data:{content}","more":[1,{{"x":"{text}"}}]}}'
        body = body[: rng.randrange(len(body))] if rng.random() < 0.1 else body
        try:
            expected = json.loads(body)
        except ValueError:
            expected = None
        try:
            found = bodies.parse(bytearray(body.encode()))
        except bodies.BodyError:
            found = None
        assert found == expected, body
        outcomes.add(expected is None)
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"[" + b"[]," * 13 * MB + b"[]]", "more than 20,000 values"),
        (b'["' + b'","' * 10 * MB + b'"]', "more than 20,000 values"),
        (b'{"text_input":"' + b'\\"' * 10 * MB + b'"}', "more than 20,000 values"),
        (b'{"text_input":"' + b"\\" * 20 * MB + b'"}', "backslashes in a row"),
        (b" " * 20 * MB + b"{}", "more than 1,048,576 bytes besides"),
        (b"1" * 20 * MB, "more than 1,048,576 bytes besides"),
        (b'{"text_input":"' + b"a" * 20 * MB, "does not end"),
        (URI + b"A" * 20 * MB + b'"', "not JSON"),
        (b"[" * 60_000, "nested too deeply"),
    ],
    ids=["lists", "strings", "quotes", "backslashes", "blanks", "digits", "no-end", "no-brace", "deep"],
)
def test_what_would_cost_much_is_refused_for_little(body: bytes, said: str) -> None:
    given = bytearray(body)
    tracemalloc.start()
    try:
        with pytest.raises(bodies.BodyError, match=said):
            bodies.parse(given)
        assert tracemalloc.get_traced_memory()[1] < max(len(body) // 4, 6 * MB)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "num_characters"),
    [
        (b"A" * 30 * MB, 30 * MB),
        (b"AAAA\\/" * 5 * MB, 25 * MB),
        (b"\\u0041" * 5 * MB, 5 * MB),
        ("é€".encode() * 6 * MB, 30 * MB),
    ],
    ids=["plain", "slashes", "escapes", "no-ascii"],
)
def test_a_data_uri_takes_less_than_three_times_the_body(content: bytes, num_characters: int) -> None:
    given = bytearray(URI + content + b'","text_input":"a car"}')
    length = len(given)
    tracemalloc.start()
    try:
        parsed = bodies.parse(given)
        assert length + tracemalloc.get_traced_memory()[1] < 2.2 * length  # the body was there before
    finally:
        tracemalloc.stop()
    assert (len(parsed["image_url"]), parsed["text_input"]) == (num_characters + 22, "a car")
    assert not given


def test_other_long_strings_are_not_read() -> None:
    long = "x" * 3 * MB
    parsed = bodies.parse(
        bytearray(json.dumps({"image_url": long, "text_input": long, "other": [long], long: 1}).encode())
    )
    assert parsed["image_url"] == parsed["text_input"] == TooLong(3 * MB)
    assert all(len(str(value)) < 100 for value in parsed["other"]) and all(len(key) < 100 for key in parsed)


# --------------------------------------------------------------------------------------------------------------- texts


def test_a_text_that_no_prompt_can_hold_is_refused_before_it_is_tokenized(
    model: Florence2, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = model.info()["model"]["max_positions"] - model.info()["model"]["num_image_tokens"]
    image = model.encode(SAMPLE)
    tokenized: list[int] = []
    tokenizer = model._tokenizer
    encode = type(tokenizer).encode

    def count(self: Any, prompts: Any) -> Any:
        tokenized.extend(map(len, prompts))
        return encode(self, prompts)

    monkeypatch.setattr(type(tokenizer), "encode", count)
    for text in ("a " * MB, "é" * model.max_prompt_bytes, "x" * (model.max_prompt_bytes + 1)):
        with pytest.raises(
            TextInputError, match=f"room for {room} tokens.*{model.max_prompt_bytes:,} bytes at the very most"
        ):
            model.run(tasks.OPEN_VOCABULARY_DETECTION, image, text_input=text)
    assert not tokenized
    shorter = "x" * (model.max_prompt_bytes - 100)
    with pytest.raises(TextInputError, match=rf"has \d+ tokens; this model has room for {room}"):
        model.run(tasks.OPEN_VOCABULARY_DETECTION, image, text_input=shorter)
    assert len(tokenized) == 1


def test_the_byte_limit_holds_for_every_text(model: Florence2) -> None:
    """T tokens never hold more than T times the longest token: what the limit rests on."""
    longest = model._tokenizer.max_token_bytes
    rng = random.Random(3)
    for _ in range(300):
        text = "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(160, 0xD800), 32))) for _ in range(40))
        ids, _ = model._tokenizer.encode([text * rng.randrange(1, 9)])
        assert len(text.encode()) <= ids.shape[1] * longest


def test_an_error_quotes_no_long_text() -> None:
    searched = tasks.OPEN_VOCABULARY_DETECTION
    for task, text in ((tasks.CAPTION, "a" * MB), (searched, " " * MB), (searched, "\ud800" * MB)):
        with pytest.raises(TextInputError) as caught:
            task.format_prompt(text)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("num_bytes", [30_000, 3 * MB])
@pytest.mark.parametrize("prefix", ["", "/queue"])
def test_long_texts_over_http(client: Any, model: Florence2, num_bytes: int, prefix: str) -> None:
    asked = {"image_url": fal.encode_file(SAMPLE), "text_input": "x" * num_bytes}
    response = client.post(f"{prefix}/{APP}/open-vocabulary-detection", json=asked)
    if prefix:  # as at fal, the request fails when its result is fetched
        assert response.status_code == 200
        response = client.get(response.json()["response_url"])
    assert response.status_code == 422
    (error,) = response.json()["detail"]
    assert (error["loc"], error["type"]) == (["body", "text_input"], "string_too_long")
    assert (
        f"the text has {num_bytes:,} bytes" in error["msg"]
        and f"{model.max_prompt_bytes:,} bytes at the very" in error["msg"]
    )
    # a task without a text ignores it, as every unknown field
    assert client.post(f"/{APP}/caption", json=asked).status_code == 200


def test_the_same_in_process(model: Florence2) -> None:
    with pytest.raises(RequestError, match="the text has 3,000,000 bytes"):
        contract.read_arguments(
            tasks.OPEN_VOCABULARY_DETECTION,
            {"image_url": "data:,", "text_input": "x" * 3 * MB},
            check_text_bytes=model.check_prompt_bytes,
        )
    with pytest.raises(RequestError, match="only a data: URI may be that long"):
        contract.read_arguments(tasks.CAPTION, {"image_url": TooLong(5)})


# ------------------------------------------------------------------------------------------------------------ over HTTP


def png(side: int) -> bytes:
    """An image of random pixels, which cannot be compressed."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", (side, side), random.Random(side).randbytes(3 * side * side)).save(buffer, "BMP")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("make", "status", "kind"),
    [
        (lambda: b"[" + b"[]," * 13 * MB + b"[]]", 422, "json_invalid"),
        (lambda: URI + b"AA AA\\n" * 5 * MB + b'"}', 422, "image_load_error"),
        (lambda: b'{"image_url":"data:,' + b"%41" * 14 * MB + b'"}', 422, "image_load_error"),
        (lambda: b'{"image_url":"data:,' + b"A" * 60 * MB + b'"}', 422, "file_too_large"),
        (lambda: b'{"image_url":"http://' + b"A" * 40 * MB + b'"}', 422, "string_too_long"),
    ],
    ids=["lists", "blanks", "percent", "over-the-limit", "address"],
)
def test_memory_stays_under_three_times_the_body(
    make: Any, status: int, kind: str, client: Any, server: LiveServer
) -> None:
    content = make()
    client.get("/health")
    reset_peak(server)
    before = peak_mb(server)
    response = client.post(f"/{APP}/caption", content=content)
    assert (response.status_code, response.json()["detail"][0]["type"]) == (status, kind)
    assert peak_mb(server) - before < 3 * len(content) / MB


def test_forms_of_data_uris_are_read(client: Any) -> None:
    content = png(260)
    expected = client.post(f"/{APP}/caption", json={"image_url": fal.encode(content, "image/bmp")})
    assert expected.status_code == 200
    lines = base64.encodebytes(content).decode()
    forms = {
        "line breaks": json.dumps({"image_url": f"data:image/bmp;base64,{lines}"}),
        "escaped slashes": json.dumps({"image_url": f"data:image/bmp;base64,{lines}"}).replace("/", "\\/"),
        "unicode escapes": json.dumps({"image_url": fal.encode(content, "image/bmp")}).replace("+", "\\u002B"),
        "percent": json.dumps({"image_url": "data:image/bmp," + "".join(f"%{byte:02x}" for byte in content)}),
    }
    for name, body in forms.items():
        assert client.post(f"/{APP}/caption", content=body).json() == expected.json(), name


def test_a_client_that_hangs_up_inside_a_body_is_no_error_of_ours(client: Any, server: LiveServer) -> None:
    from tests.server.test_server import metric

    before = {status: metric(client, "florence_requests_total", status=status) for status in ("499", "500")}
    for path in (f"/{APP}/caption", f"/queue/{APP}/caption", "/files/upload", "/storage/upload/initiate"):
        with socket.create_connection((server.host, server.port)) as connection:
            connection.sendall(f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n{{".encode())
    wait_for(lambda: metric(client, "florence_requests_total", status="499") == before["499"] + 4)
    assert metric(client, "florence_requests_total", status="500") == before["500"]
    assert "Traceback" not in server.stderr


def test_an_error_with_a_lone_surrogate_can_be_streamed(client: Any, server: LiveServer) -> None:
    asked = {**arguments(tasks.CAPTION), "image_url": "data:\ud800"}
    submitted = client.post(f"/queue/{APP}/caption", content=json.dumps(asked)).json()
    with client.stream("GET", submitted["status_url"] + "/stream") as response:
        events = [json.loads(line[5:]) for line in response.iter_lines() if line.startswith("data:")]
    assert events[-1]["status"] == "COMPLETED" and "\ud800" in events[-1]["error"]
    assert "Traceback" not in server.stderr
