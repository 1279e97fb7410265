"""The comparison of fal and this package; servers on loopback stand in for fal and for our own server."""

from __future__ import annotations

import base64
import datetime
import itertools
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer", reason="the command line needs: pip install 'florence-onnx[cli]'")
pytest.importorskip("fal_client", reason="the comparison needs: pip install 'florence-onnx[fal]'")
pytest.importorskip("rapidfuzz", reason="the comparison needs: pip install 'florence-onnx[fal]'")
pytest.importorskip("onnxruntime", reason="the demo model runs on ONNX Runtime: pip install 'florence-onnx[cpu]'")

from typer.testing import CliRunner, Result

from florence_onnx import Florence2, Region, tasks
from florence_onnx.bench_fal import agreement
from florence_onnx.bench_fal.budget import Budget, BudgetSpentError
from florence_onnx.bench_fal.journal import Finished, Journal
from florence_onnx.bench_fal.plan import Call, Inputs, make_plan, read_inputs
from florence_onnx.bench_fal.rate_limit import RateLimiter
from florence_onnx.bench_fal.runner import MAX_FAILURES, Runner, outstanding
from florence_onnx.bench_fal.targets import ClientTarget, Reply, find_key, parse_targets, require_key
from florence_onnx.bench_fal.transport import CallFailedError
from florence_onnx.commands.bench_fal import JOURNAL
from florence_onnx.commands.demo import SAMPLES
from florence_onnx.commands.main import app
from florence_onnx.errors import ImageError, InputError, TextInputError, UnknownTaskError
from florence_onnx.inference.answering import HostAnswering
from tests import live_server

KEY = "key-0123456789:secret-9876543210"
SCENES = [str(SAMPLES / f"scene-{number}.png") for number in (1, 2)]
ALL_AT_FAL = [slug for slug in tasks.TASKS if slug != "region-to-ocr"]

Answer = tuple[int, Any]
"""Status and JSON."""


class StandIn:
    """A server on loopback that speaks fal's `run`."""

    def __init__(self, respond: Callable[[str, dict[str, Any]], Answer], headers: dict[str, str] | None = None) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        """Path and body of each request."""
        self.keys: list[str | None] = []
        """Header `Authorization` of each request."""
        self.respond = respond
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                arguments = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, arguments))
                outer.keys.append(self.headers["Authorization"])
                status, answer = outer.respond(self.path.rpartition("/")[2], arguments)
                body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def model() -> Florence2:
    return Florence2.from_pretrained("demo", device="cpu")


def _answer_with(model: Florence2) -> Callable[[str, dict[str, Any]], Answer]:
    def respond(slug: str, arguments: dict[str, Any]) -> Answer:
        region = Region(**arguments["region"]) if "region" in arguments else None
        text = arguments.get("text_input")
        return 200, model.run(slug, arguments["image_url"], text_input=text, region=region).to_dict()

    return respond


@pytest.fixture
def stand_in(model: Florence2) -> Iterator[StandIn]:
    """The demo model behind fal's API."""
    server = StandIn(_answer_with(model))
    yield server
    server.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., StandIn]]:
    """Starts servers with the responses of a test."""
    servers = []

    def start(respond: Callable[[str, dict[str, Any]], Answer], headers: dict[str, str] | None = None) -> StandIn:
        servers.append(StandIn(respond, headers))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FAL_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("FLORENCE_ONNX_API_KEY", raising=False)
    monkeypatch.setenv("FAL_KEY", KEY)


def _caption(slug: str, arguments: dict[str, Any]) -> Answer:
    return 200, {"results": "A circle."}


def _bench(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["bench-fal", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def _fal(server: StandIn, out: Path, *arguments: object, max_calls: int = 100) -> Result:
    """Runs the command with fal as the only target, replaced by a server, and without a rate limit."""
    common = ("--fal-url", server.url, "--out", out, "--rate", 1e9, "--yes", "--max-calls", max_calls)
    return _bench(*common, "--targets", "fal", *arguments)


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / JOURNAL).read_text(encoding="utf-8").splitlines()]


def _report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return found


class FakeClock:
    """A clock that only `sleep` advances."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> datetime.datetime:
        return datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc) + datetime.timedelta(seconds=self.seconds)

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.seconds += seconds


# --------------------------------------------------------------------------------------------------- whole comparisons


def test_our_server_stands_in_for_fal(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the server needs: pip install 'florence-onnx[serve]'")
    with live_server.serve("--api-key", KEY, environment={"OMP_NUM_THREADS": "1"}) as server:
        arguments = ("--targets", "in-process,fal", "--fal-url", server.url, "--text", "red circle")
        limits = ("--rate", 1e9, "--max-calls", 28, "--yes", "--device", "cpu", "--out", tmp_path)
        region = ("--region", "430,364,592,539")
        result = _bench(*SCENES, "--tasks", ",".join(ALL_AT_FAL), "--repeats", 1, *arguments, *limits, *region)
    assert result.exit_code == 0, result.output
    report = _report(tmp_path)
    assert report["num_sent_to_fal"] == 28 and report["num_missing"] == 0 and not report["errors"]
    assert report["agreement"]
    for row in report["agreement"]:
        assert (row["num_unreadable"], row["agreement"]["equal"]) == (0, 1), row


def test_equal_answers_of_three_targets_agree_completely(stand_in: StandIn, tmp_path: Path) -> None:
    targets = f"in-process,served={stand_in.url},fal"
    region = "430,364,592,539"
    arguments = ("--targets", targets, "--fal-url", stand_in.url, "--text", "red circle", "--region", region)
    limits = ("--rate", 1e9, "--max-calls", 28, "--yes", "--device", "cpu", "--out", tmp_path)
    result = _bench(SCENES[0], "--tasks", ",".join(ALL_AT_FAL), "--repeats", 2, *arguments, *limits)
    assert result.exit_code == 0, result.output

    assert len(stand_in.requests) == 2 * 2 * len(ALL_AT_FAL)
    assert {path for path, _ in stand_in.requests} == {f"/fal-ai/florence-2-large/{slug}" for slug in ALL_AT_FAL}
    encoded = base64.b64encode(Path(SCENES[0]).read_bytes()).decode()
    assert {body["image_url"] for _, body in stand_in.requests} == {f"data:image/png;base64,{encoded}"}
    assert sorted(map(str, set(stand_in.keys))) == [f"Key {KEY}", "Key none"]  # fal's key is for fal only

    report = _report(tmp_path)
    assert report["num_sent_to_fal"] == 28 and report["num_missing"] == 0 and not report["errors"]
    timing = {(row["target"], row["task"]): row for row in report["timing"]}
    assert len(timing) == 3 * (len(ALL_AT_FAL) + 1)
    for name in ("in-process", "served", "fal"):
        row = timing[name, "all"]
        assert (row["num_answered"], row["num_failed"], len(row["cold"]), row["num_warm"]) == (28, 0, 1, 27)
        assert 0 < row["p50"] <= row["p95"] and row["repeatable"] == 1
        rate = 0.00125 if name == "fal" else 0.5 / 3600
        assert row["price_per_1000"] == pytest.approx(row["mean"] * rate * 1000)
    fal, served = timing["fal", "ocr"], timing["served", "ocr"]
    assert served["price_ratio"] == pytest.approx(fal["price_per_1000"] / served["price_per_1000"])
    assert served["speed_ratio"] == pytest.approx(fal["p50"] / served["p50"])
    assert fal["price_ratio"] is None

    for row in report["agreement"]:
        assert row["reference"] == "fal" and row["target"] != "fal" and row["num_unreadable"] == 0
        assert row["agreement"]["equal"] == 1
        assert set(row["agreement"]["f1"].values()) <= {1.0, None}
    for task in ("object-detection", "ocr-with-region", "region-to-segmentation"):
        (found, _) = (row["agreement"] for row in report["agreement"] if row["task"] == task)
        assert found["f1"] == found["f1_blind"] == {"0.5": 1.0, "0.75": 1.0, "0.9": 1.0}
    assert found["mask_iou"] == 1.0

    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| target     | task " in text and "## Agreement with fal" in text and "`<loc_…>`" in text
    assert "Times and prices" in result.stdout and "28 of 28 outstanding calls will be sent to fal" in result.stderr
    assert all(secret not in path.read_text() for path in tmp_path.iterdir() for secret in KEY.split(":"))


def test_raw_answers_and_headers_are_kept(serve: Callable[..., StandIn], tmp_path: Path) -> None:
    raw = {"results": "</s>A  circle.", "extra": [1, None], "image": {"url": "https://v3.fal.media/x.png"}}
    headers = {"x-fal-billable-units": "0.5", "x-fal-request-id": "abc", "Set-Cookie": "a=b"}
    server = serve(lambda slug, arguments: (200, raw), headers)
    assert _fal(server, tmp_path, SCENES[0], "--tasks", "caption", "--repeats", 2).exit_code == 0
    sent, finished, *_ = _lines(tmp_path)
    assert sent == {"kind": "sent", "call": finished["call"], "target": f"fal {server.url}", "when": sent["when"]}
    assert finished["answer"] == raw and finished["status"] == 200 and finished["is_cold"]
    assert finished["headers"] == {"x-fal-billable-units": "0.5", "x-fal-request-id": "abc"}
    (row,) = _report(tmp_path)["timing"]
    assert row["billable_units"] == 0.5
    assert not _report(tmp_path)["agreement"]


# ------------------------------------------------------------------------------------------- resuming and limits


def test_an_interrupted_run_is_resumed_and_sends_nothing_twice(serve: Callable[..., StandIn], tmp_path: Path) -> None:
    def interrupt(slug: str, arguments: dict[str, Any]) -> Answer:
        if len(server.requests) == 4:
            server.respond = _caption
            raise_in_main.set()
        return _caption(slug, arguments)

    server, raise_in_main = serve(interrupt), threading.Event()
    plan_arguments = (*SCENES, "--tasks", "caption,detailed-caption", "--repeats", 2)
    # Ctrl-C between two calls
    with pytest.MonkeyPatch.context() as patch:
        original = Journal.write_finished

        def write(self: Journal, finished: Finished) -> None:
            original(self, finished)
            if raise_in_main.is_set():
                raise KeyboardInterrupt

        patch.setattr(Journal, "write_finished", write)
        first = _fal(server, tmp_path, *plan_arguments)
    assert first.exit_code == 1 and "interrupted" in first.stderr
    assert len(server.requests) == 4 and _report(tmp_path)["num_missing"] == 4

    second = _fal(server, tmp_path, *plan_arguments)
    assert second.exit_code == 0, second.output
    assert "4 of 4 outstanding calls will be sent to fal (4 were sent before" in second.stderr
    asked = [(path, body["image_url"]) for path, body in server.requests]
    assert len(asked) == 8 and all(asked.count(each) == 2 for each in asked)  # two repeats
    row = next(row for row in _report(tmp_path)["timing"] if row["task"] == "all")
    assert (row["num_answered"], len(row["cold"]), row["num_warm"]) == (8, 2, 6)  # one cold call per process

    third = _bench(*plan_arguments, "--targets", "fal", "--fal-url", server.url, "--out", tmp_path)
    assert (
        third.exit_code == 0 and len(server.requests) == 8
    )  # nothing left: neither a limit nor a confirmation is needed


def test_an_interrupted_call_is_counted_and_repeated(serve: Callable[..., StandIn], tmp_path: Path) -> None:
    server = serve(_caption)
    assert _fal(server, tmp_path, SCENES[0], "--tasks", "caption", "--repeats", 1, max_calls=2).exit_code == 0
    path = tmp_path / JOURNAL
    sent, _ = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(sent)  # the process was killed while it waited for the answer
    assert _fal(server, tmp_path, SCENES[0], "--tasks", "caption", "--repeats", 1, max_calls=2).exit_code == 0
    assert len(server.requests) == 2
    path.write_bytes(sent * 2)
    refused = _fal(server, tmp_path, SCENES[0], "--tasks", "caption", "--repeats", 1, max_calls=2)
    assert refused.exit_code == 1 and len(server.requests) == 2
    assert "2 calls were sent to fal, --max-calls is 2" in refused.stderr


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504])
def test_retries_of_fal_client_stay_within_the_budget(
    status: int, serve: Callable[..., StandIn], tmp_path: Path
) -> None:
    """By itself, fal_client would send each of these up to ten times."""
    server = serve(lambda slug, arguments: (status, b"<html>nginx</html>"))
    for _ in range(4):  # resumed several times
        result = _fal(server, tmp_path, *SCENES, "--tasks", "caption", "--repeats", 2, max_calls=7)
        assert result.exit_code == 1
    assert len(server.requests) == 7 == sum(line["kind"] == "sent" for line in _lines(tmp_path))
    report = _report(tmp_path)
    assert report["num_sent_to_fal"] == 7 and report["num_missing"] == 4
    assert {error["status"] for error in report["errors"]} == {status}
    assert report["stopped"]["fal"] == "7 calls were sent to fal, --max-calls is 7"


def test_a_budget_below_the_plan_covers_every_question(serve: Callable[..., StandIn], tmp_path: Path) -> None:
    server = serve(_caption)
    result = _fal(server, tmp_path, *SCENES, "--tasks", "caption,ocr", "--repeats", 5, max_calls=4)
    assert result.exit_code == 1 and "4 of 20 outstanding calls" in result.stderr
    assert len({(path, body["image_url"]) for path, body in server.requests}) == len(server.requests) == 4


def test_broken_connections_are_not_retried(serve: Callable[..., StandIn], tmp_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    accepted = []

    def disconnect() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.recv(65536)
            accepted.append(connection)
            connection.close()

    threading.Thread(target=disconnect, daemon=True).start()
    server = serve(_caption)
    server.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    result = _fal(server, tmp_path, SCENES[0], "--tasks", "caption", "--repeats", 2, max_calls=10)
    listener.close()
    assert result.exit_code == 1 and len(accepted) == 2
    assert {error["status"] for error in _report(tmp_path)["errors"]} == {None}


def test_a_redirect_is_not_followed(serve: Callable[..., StandIn], tmp_path: Path) -> None:
    elsewhere = serve(_caption)
    server = serve(lambda slug, arguments: (307, b"moved"), {"Location": elsewhere.url})
    assert _fal(server, tmp_path, SCENES[0], "--tasks", "caption", "--repeats", 1).exit_code == 1
    assert len(server.requests) == 1 and not elsewhere.requests


def test_a_target_that_keeps_failing_is_skipped(serve: Callable[..., StandIn], tmp_path: Path) -> None:
    server = serve(lambda slug, arguments: (503, {"detail": "runner is gone"}))
    _fal(server, tmp_path, SCENES[0], "--tasks", "caption", "--repeats", 20)
    assert len(server.requests) == MAX_FAILURES
    assert "runner is gone" in _report(tmp_path)["stopped"]["fal"]


def test_a_rejected_key_stops_the_target_and_is_not_shown(serve: Callable[..., StandIn], tmp_path: Path) -> None:
    server = serve(lambda slug, arguments: (401, {"detail": f"No user found for {KEY}"}))
    result = _fal(server, tmp_path, SCENES[0], "--tasks", "caption", "--repeats", 3)
    assert result.exit_code == 1 and len(server.requests) == 1
    assert "it rejects the key or the account with 401" in result.stderr and "No user found for ***" in result.stderr
    assert KEY not in result.output and all(KEY not in path.read_text() for path in tmp_path.iterdir())
    server.respond = _caption  # with the right key the comparison resumes
    assert _fal(server, tmp_path, SCENES[0], "--tasks", "caption", "--repeats", 3).exit_code == 0


def test_errors_are_reported_and_what_fal_rejects_is_not_sent_again(
    serve: Callable[..., StandIn], tmp_path: Path
) -> None:
    detail = [{"loc": ["body", "image_url"], "msg": "Too small", "type": "image_too_small"}]

    def respond(slug: str, arguments: dict[str, Any]) -> Answer:
        return _caption(slug, arguments) if slug == "caption" else (422, {"detail": detail})

    server = serve(respond)
    for _ in range(2):
        result = _fal(server, tmp_path, SCENES[0], "--tasks", "caption,ocr", "--repeats", 2)
        assert result.exit_code == 1
        assert "fal, ocr of scene-1.png: 422:" in result.stdout and "image_too_small" in result.stdout
    assert len(server.requests) == 4
    timing = {row["task"]: row for row in _report(tmp_path)["timing"]}
    assert (timing["ocr"]["num_failed"], timing["ocr"]["p50"], timing["ocr"]["price_per_1000"]) == (2, None, None)
    assert (timing["caption"]["num_failed"], timing["caption"]["num_answered"]) == (0, 2)
    assert "image_too_small" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_an_answer_that_is_not_json_is_an_error(serve: Callable[..., StandIn], tmp_path: Path) -> None:
    server = serve(lambda slug, arguments: (200, b"<html>"))
    assert _fal(server, tmp_path, SCENES[0], "--tasks", "caption", "--repeats", 1).exit_code == 1
    assert "not JSON" in _report(tmp_path)["errors"][0]["error"]


def test_every_call_in_process_runs_the_vision_encoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    encoded, original = [], HostAnswering.encode

    def count(self: HostAnswering, image: Any, preparation: Any) -> Any:
        encoded.append(image.size)
        return original(self, image, preparation)

    monkeypatch.setattr(HostAnswering, "encode", count)
    arguments = ("--targets", "in-process", "--tasks", "caption,object-detection", "--repeats", 2, "--device", "cpu")
    assert _bench(SCENES[0], *arguments, "--out", tmp_path).exit_code == 0
    assert len(encoded) == 4


def test_an_annotated_image_inside_the_answer_is_not_kept(tmp_path: Path) -> None:
    arguments = ("--targets", "in-process", "--tasks", "object-detection", "--repeats", 1, "--device", "cpu")
    assert _bench(SCENES[0], *arguments, "--out", tmp_path).exit_code == 0
    (line,) = _lines(tmp_path)
    assert re.fullmatch(r"data:image/png;base64,… \(\d+ characters\)", line["answer"]["image"]["url"])
    assert line["answer"]["results"]["bboxes"] and (tmp_path / JOURNAL).stat().st_size < 4000


def test_in_process_errors_are_recorded(tmp_path: Path) -> None:
    result = _bench("data:image/png;base64,AAAA", "--targets", "in-process", "--tasks", "caption", "--out", tmp_path)
    assert result.exit_code == 1
    assert all(line["status"] == 422 and "not an image" in line["error"] for line in _lines(tmp_path))


# ------------------------------------------------------------------------------------------------------ cost and keys


@pytest.mark.parametrize("names", [(), ("FAL_KEY_ID",), ("FAL_KEY_SECRET",)])
def test_a_missing_key_is_explained(
    names: Sequence[str], serve: Callable[..., StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FAL_KEY")
    for name in names:
        monkeypatch.setenv(name, "half-a-key")
    server = serve(_caption)
    result = _fal(server, tmp_path, SCENES[0], "--tasks", "caption")
    assert result.exit_code == 2 and not server.requests
    assert "FAL_KEY=…" in result.stderr and "fal.ai/dashboard/keys" in result.stderr and "--targets" in result.stderr


def test_nothing_is_sent_without_a_limit_or_a_confirmation(serve: Callable[..., StandIn], tmp_path: Path) -> None:
    server = serve(_caption)
    common = (SCENES[0], "--tasks", "caption", "--targets", "fal", "--fal-url", server.url, "--out", tmp_path)
    no_limit = _bench(*common, "--yes")
    assert no_limit.exit_code == 2 and "--max-calls" in no_limit.stderr
    unconfirmed = _bench(*common, "--max-calls", 3)
    assert unconfirmed.exit_code == 2 and "nothing was sent" in unconfirmed.stderr
    price = 3 * 5 * 0.00125
    assert f"3 of 3 outstanding calls will be sent to fal (0 were sent before, --max-calls 3): about ${price:.3f}" in (
        unconfirmed.stderr
    )
    assert not server.requests


def test_the_key_is_read_as_fal_client_reads_it() -> None:
    assert find_key({"FAL_KEY": " abc\n"}) == "abc"
    assert find_key({"FAL_KEY_ID": "a", "FAL_KEY_SECRET": "b"}) == "a:b"
    assert find_key({"FAL_KEY": "", "FAL_KEY_ID": "a"}) is None
    with pytest.raises(InputError, match="copy the key again") as caught:
        require_key({"FAL_KEY": "geheim\nxyz"})
    assert "geheim" not in str(caught.value)


def test_a_server_of_ours_gets_its_own_key(
    serve: Callable[..., StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLORENCE_ONNX_API_KEY", "our-own-key")
    server = serve(lambda slug, arguments: (401, {"detail": "not our-own-key"}))
    _bench(SCENES[0], "--tasks", "caption", "--targets", f"served={server.url}", "--out", tmp_path)
    assert server.keys == ["Key our-own-key"]
    assert all("our-own-key" not in path.read_text() for path in tmp_path.iterdir())


def test_a_task_that_fal_does_not_have_is_refused(tmp_path: Path) -> None:
    arguments = (SCENES[0], "--tasks", "region-to-ocr", "--region", "1,2,3,4", "--max-calls", 9, "--yes")
    result = _bench(*arguments, "--targets", "fal", "--out", tmp_path)
    assert result.exit_code == 2 and "fal has no endpoint for region-to-ocr" in result.stderr


# ----------------------------------------------------------------------------------------------------------- the rate limit


def test_the_rate_limit_holds_when_a_comparison_is_resumed(serve: Callable[..., StandIn], tmp_path: Path) -> None:
    server, clock = serve(_caption), FakeClock()
    plan = make_plan(SCENES, ["caption"], Inputs(), 2)

    def ask(calls: Sequence[Call]) -> None:
        with Journal(tmp_path / JOURNAL) as journal:
            budget = Budget(10, journal, RateLimiter(20, clock, journal.last_sent), clock)
            target = ClientTarget("fal", server.url, KEY, timeout=10, budget=budget)
            Runner([target], journal, clock, lambda line: None).run(calls)

    ask(plan[:3])
    clock.seconds += 1  # the next process starts a second later
    ask(plan)
    whens = [datetime.datetime.fromisoformat(line["when"]) for line in _lines(tmp_path) if line["kind"] == "sent"]
    gaps = [(b - a).total_seconds() for a, b in itertools.pairwise(whens)]
    assert gaps == pytest.approx([3.0, 3.0, 3.0])  # 20 per minute
    # the times do not include the wait for the rate limit
    assert [line["seconds"] for line in _lines(tmp_path) if line["kind"] == "finished"] == [0.0] * 4


def test_a_wall_clock_that_was_set_back_costs_one_interval_at_most() -> None:
    clock = FakeClock()
    pace = RateLimiter(60, clock, clock.now() + datetime.timedelta(days=1))
    pace.wait()
    assert clock.seconds == 1001
    clock.seconds += 5
    pace.wait()
    assert clock.seconds == 1006


def test_a_spent_budget_does_not_wait(tmp_path: Path) -> None:
    clock = FakeClock()
    (call,) = make_plan(SCENES[:1], ["caption"], Inputs(), 1)
    with Journal(tmp_path / JOURNAL) as journal:
        budget = Budget(1, journal, RateLimiter(1, clock), clock)
        budget.admit(call, "fal")
        with pytest.raises(BudgetSpentError):
            budget.admit(call, "fal")
        assert clock.seconds == 1000 and journal.num_sent == 1


def test_one_permission_allows_one_request(serve: Callable[..., StandIn]) -> None:
    server = serve(_caption)
    (call,) = make_plan(SCENES[:1], ["caption"], Inputs(), 1)
    target = ClientTarget("served", server.url, "none", timeout=10)
    with pytest.raises(CallFailedError, match="not sent"):
        target.ask(call)
    target.prepare(call)
    assert target.ask(call).answer == {"results": "A circle."}
    with pytest.raises(CallFailedError, match="second request"):
        target.ask(call)
    assert len(server.requests) == 1


# -------------------------------------------------------------------------------------------------------- the journal


@pytest.mark.parametrize("num_bytes", [1, 30, -1])
def test_a_half_written_line_is_tolerated(num_bytes: int, serve: Callable[..., StandIn], tmp_path: Path) -> None:
    server = serve(_caption)
    arguments = (SCENES[0], "--tasks", "caption", "--repeats", 2)
    assert _fal(server, tmp_path, *arguments).exit_code == 0
    path = tmp_path / JOURNAL
    *whole, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole) + last[:num_bytes])
    assert _fal(server, tmp_path, *arguments).exit_code == 0
    assert len(server.requests) == (2 if num_bytes == -1 else 3)  # only the line break was missing: nothing is lost
    assert _report(tmp_path)["num_sent_to_fal"] == len(server.requests)
    assert [line["kind"] for line in _lines(tmp_path)].count("finished") == 2


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text('{"kind": "sent", "call": "a", "tar\n{"kind": "other"}\n', encoding="utf-8")
    result = _bench(SCENES[0], "--targets", "in-process", "--out", tmp_path)
    assert result.exit_code == 2 and "line 1 of the journal" in result.stderr


def test_a_journal_has_one_writer(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="the lock is POSIX's")
    with Journal(tmp_path / JOURNAL), pytest.raises(InputError, match="another process"):
        Journal(tmp_path / JOURNAL)
    Journal(tmp_path / JOURNAL).__exit__(None, None, None)


def test_a_journal_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = _bench(SCENES[0], "--targets", "in-process", "--out", tmp_path / "file")
    assert result.exit_code == 2 and "cannot write the journal" in result.stderr


def test_answers_of_another_model_are_not_reused(tmp_path: Path) -> None:
    class Target:
        name = "in-process"

        def __init__(self, identity: str) -> None:
            self.identity = identity

        def prepare(self, call: Call) -> None:
            pass

        def ask(self, call: Call) -> Reply:
            return Reply({"results": self.identity})

    plan = make_plan(SCENES[:1], ["caption"], Inputs(), 1)
    base, large = Target("in-process base"), Target("in-process large")
    with Journal(tmp_path / JOURNAL) as journal:
        Runner([base], journal, FakeClock(), lambda line: None).run(plan)
        assert outstanding(plan, base, journal) == [] and outstanding(plan, large, journal) == plan


# ------------------------------------------------------------------------------------------------------ the agreement


def _boxes(*boxes: tuple[float, float, float, float, str], kind: str = "bboxes") -> dict[str, Any]:
    return {"results": {kind: [dict(zip("xywh", box[:4], strict=True), label=box[4]) for box in boxes]}}


def test_shifted_boxes_give_the_f1_worked_out_by_hand(serve: Callable[..., StandIn], tmp_path: Path) -> None:
    ours = serve(
        lambda slug, arguments: (
            200,
            _boxes((0, 0, 100, 10, "a"), (0, 50, 100, 10, "b"), (0, 90, 100, 10, "c"), (0, 200, 10, 10, "d")),
        )
    )
    theirs = serve(
        lambda slug, arguments: (
            200,
            _boxes((4, 0, 100, 10, "a"), (10, 50, 100, 10, "b"), (25, 90, 100, 10, "c"), (0, 200, 10, 10, "other")),
        )
    )
    arguments = ("--targets", f"served={ours.url},fal", "--fal-url", theirs.url, "--max-calls", 9, "--yes")
    result = _bench(
        SCENES[0], "--tasks", "object-detection", "--repeats", 1, *arguments, "--rate", 1e9, "--out", tmp_path
    )
    assert result.exit_code == 0, result.output
    (row,) = _report(tmp_path)["agreement"]
    # IoU: a 96/104 = 0.92, b 90/110 = 0.82, c 75/125 = 0.6, d 1 with another label; F1 = 2 x pairs / (4 + 4)
    assert row["agreement"]["f1"] == {"0.5": 0.75, "0.75": 0.5, "0.9": 0.25}
    assert row["agreement"]["f1_blind"] == {"0.5": 1.0, "0.75": 0.75, "0.9": 0.5}
    assert row["agreement"]["equal"] == 0
    assert re.search(r"served +\| object-detection \| +1 \| +0 \| +4/4 \| +0.750 \| +0.500 \| +0.250 ", result.stdout)


def test_tokens_in_fals_answers_are_normalised() -> None:
    raw = _boxes((1, 2, 30, 40, "</s>EXPLORE."), (5, 60, 7, 8, " two  words\n"), kind="quad_boxes")
    clean = _boxes((1, 2, 30, 40, "EXPLORE."), (5, 60, 7, 8, "two words"), kind="quad_boxes")
    fal, ours = agreement.read_answer(raw), agreement.read_answer(clean)
    assert fal == ours and fal is not None and fal.text == "EXPLORE.\ntwo words"
    assert agreement.normalise("</s><s>a cat<loc_52><loc_332><loc_932><loc_774></s>") == "a cat"
    assert agreement.normalise("1 < 2 <b>") == "1 < 2 <b>"


def _compare(expected: Any, answer: Any) -> agreement.Agreement:
    a, b = agreement.read_answer(expected), agreement.read_answer(answer)
    assert a is not None and b is not None
    return agreement.summarise([agreement.compare(a, b)])


def test_texts_are_compared_by_edit_distance() -> None:
    found = _compare({"results": "kitten"}, {"results": "sitting"})
    assert found.text_similarity == pytest.approx(1 - 3 / 7) and found.equal == 0
    assert found.f1 == {"0.5": None, "0.75": None, "0.9": None} and found.mask_iou is None
    nothing = _compare({"results": ""}, {"results": " "})
    assert nothing.text_similarity is None and nothing.equal == 1


def _polygon(*points: tuple[float, float]) -> dict[str, Any]:
    return {"points": [{"x": x, "y": y} for x, y in points], "label": ""}


def test_outlines_are_compared_by_area_and_by_bounding_box() -> None:
    square = _polygon((0, 0), (100, 0), (100, 100), (0, 100))
    triangle = _polygon((0, 0), (100, 0), (100, 100))
    found = _compare({"results": {"polygons": [square]}}, {"results": {"polygons": [triangle]}})
    assert found.f1["0.9"] == 1.0 and found.mask_iou == pytest.approx(0.5, abs=0.01)
    empty = _compare({"results": {"polygons": []}}, {"results": {"polygons": []}})
    assert empty.mask_iou is None and empty.f1["0.5"] is None and empty.equal == 1


def test_boxes_are_matched_one_to_one() -> None:
    twice, once = _boxes((0, 0, 10, 10, "a"), (0, 0, 10, 10, "a")), _boxes((0, 0, 10, 10, "a"))
    assert _compare(twice, once).f1["0.5"] == pytest.approx(2 / 3)
    assert _compare(once, twice).f1["0.5"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "raw",
    [
        None,
        [],
        "text",
        {},
        {"results": None},
        {"results": {}},
        {"results": {"bboxes": None}},
        {"results": {"bboxes": [{"label": "a"}]}},
        {"results": {"bboxes": [{"x": 1, "y": 1, "w": 1, "h": "wide", "label": "a"}]}},
        {"results": {"bboxes": [{"x": 1, "y": 1, "w": 1, "h": 1, "label": None}]}},
        {"results": {"polygons": [{"points": [[1, 2]], "label": ""}]}},
    ],
)
def test_answers_of_another_form_are_counted_and_break_nothing(raw: Any) -> None:
    assert agreement.read_answer(raw) is None


# ------------------------------------------------------------------------------------------------ plan and arguments


def test_ids_are_stable_and_depend_on_what_is_asked(tmp_path: Path) -> None:
    def ids(image: str, text: str = "red circle") -> set[str]:
        return {call.id for call in make_plan([image], ["open-vocabulary-detection"], Inputs(text=text), 2)}

    copy = tmp_path / "another name.png"
    copy.write_bytes(Path(SCENES[0]).read_bytes())
    assert ids(SCENES[0]) == ids(str(copy)) and len(ids(SCENES[0])) == 2
    assert not ids(SCENES[0]) & ids(SCENES[1]) and not ids(SCENES[0]) & ids(SCENES[0], "star")


def test_inputs_of_a_file_override_those_for_all_images(tmp_path: Path) -> None:
    path = tmp_path / "inputs.json"
    content = {
        "scene-1.png": {"open-vocabulary-detection": {"text_input": "star"}},
        "*": {"*": {"region": [1, 2, 3, 4]}},
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    inputs = Inputs("red circle", None, read_inputs(path))
    plan = make_plan(SCENES, ["open-vocabulary-detection", "region-to-category", "caption"], inputs, 1)
    asked = [{name: value for name, value in call.arguments.items() if name != "image_url"} for call in plan]
    region = {"region": {"x1": 1, "y1": 2, "x2": 3, "y2": 4}}
    assert asked == [{"text_input": "star"}, region, {}, {"text_input": "red circle"}, region, {}]


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"*": []}', '{"*": {"*": 1}}', '{"*": {"*": {"prompt": "x"}}}', '{"*": {"no-such-task": {}}}'],
)
def test_a_wrong_file_of_inputs_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "inputs.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError):
        read_inputs(path)


def test_an_impossible_plan_is_refused() -> None:
    with pytest.raises(UnknownTaskError):
        make_plan(SCENES, ["no-such-task"], Inputs(), 1)
    with pytest.raises(TextInputError):
        make_plan(SCENES, ["open-vocabulary-detection"], Inputs(), 1)
    with pytest.raises(ImageError):
        make_plan(["missing.png"], ["caption"], Inputs(), 1)
    with pytest.raises(InputError, match="twice"):
        make_plan([SCENES[0], SCENES[0]], ["caption"], Inputs(), 1)
    address = "https://example.com/a.png?signature=secret"
    (call,) = make_plan([address], ["caption"], Inputs(), 1)
    assert call.arguments == {"image_url": address} and call.image.name == "https://example.com/a.png"


@pytest.mark.parametrize("text", ["", "fall", "served=127.0.0.1:8000", "fal,fal", "fal=http://x", "=http://x"])
def test_wrong_targets_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_targets(text)


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rapidfuzz", None)
    result = _bench(SCENES[0], "--targets", "in-process", "--out", tmp_path)
    assert result.exit_code == 2 and "pip install 'florence-onnx[fal]'" in result.stderr


def test_the_command_has_its_own_help() -> None:
    result = _bench("--help")
    assert result.exit_code == 0 and "--max-calls" in result.stdout and "--fal-url" not in result.stdout
    assert _bench(SCENES[0], "--nonsense").exit_code == 2
