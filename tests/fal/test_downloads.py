"""Downloads for requests: apart from decoding, limited for each host, ended with their request, at a least rate."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from florence_onnx import tasks
from florence_onnx.errors import ImageDownloadError
from florence_onnx.fal import feature_cache
from florence_onnx.fal.byte_budget import ByteBudget
from florence_onnx.fal.downloads import host_of
from florence_onnx.fal.problems import RequestError
from florence_onnx.fal.service import Service, ServiceSettings, without_image
from florence_onnx.images import connection
from florence_onnx.images.download import download
from florence_onnx.images.transfer import Transfer
from florence_onnx.model import Florence2
from tests.fal.test_fal import APP, SAMPLE, SAMPLES, SlowModel, arguments, occupy, wait_for


@pytest.fixture(scope="module")
def model() -> Florence2:
    return Florence2.from_pretrained("demo", device="cpu")


class Dripping(ThreadingHTTPServer):
    """An image host that sends a byte at a time until `gate` is set, then the whole image."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Drip)
        self.gate = threading.Event()
        self.open = 0
        self.most_open = 0
        self.ended_early = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, number: int, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_port}/{number}.png"


class _Drip(BaseHTTPRequestHandler):
    server: Dripping

    def do_GET(self) -> None:
        server, content = self.server, SAMPLE.read_bytes()
        with server.lock:
            server.open += 1
            server.most_open = max(server.most_open, server.open)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        sent = 0
        try:
            while not server.gate.wait(0.02):
                self.wfile.write(content[sent : sent + 1])
                sent += 1
            self.wfile.write(content[sent:])
        except OSError:
            with server.lock:
                server.ended_early += 1
        finally:
            with server.lock:
                server.open -= 1

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def dripping() -> Iterator[Dripping]:
    server = Dripping()
    yield server
    server.gate.set()
    server.shutdown()
    server.server_close()


def make_service(model: Any, **settings: Any) -> Service:
    return Service(model, ServiceSettings(**settings), publish=without_image)


def test_images_that_come_with_their_request_never_wait_for_downloads(model: Florence2, dripping: Dripping) -> None:
    service = make_service(model, downloads=4)
    slow = [service.submit(f"{APP}/caption", {"image_url": dripping.url(n)}) for n in range(24)]
    wait_for(lambda: dripping.open == 4)
    answer = service.submit(f"{APP}/caption", arguments(tasks.CAPTION)).future.result(60)
    assert all(job.is_waiting for job in slow)
    dripping.gate.set()
    assert all(job.future.result(60).body == answer.body for job in slow)
    assert {"download", "load"} <= set(slow[0].seconds)
    assert service.close(timeout=30)


def test_one_host_has_its_share_of_the_downloads(model: Florence2, dripping: Dripping) -> None:
    service = make_service(model, downloads=8, downloads_per_host=2)
    slow = [service.submit(f"{APP}/caption", {"image_url": dripping.url(n)}) for n in range(10)]
    wait_for(lambda: dripping.open == 2)
    other = Dripping()
    other.gate.set()
    quick = service.submit(f"{APP}/caption", {"image_url": other.url(0, "localhost")})
    assert quick.future.result(60)
    assert all(job.is_waiting for job in slow) and dripping.most_open == 2
    dripping.gate.set()
    assert all(job.future.result(60) for job in slow)
    other.shutdown()
    other.server_close()
    assert service.close(timeout=30)


def test_cancelling_a_request_ends_its_download(model: Florence2, dripping: Dripping) -> None:
    service = make_service(model)
    jobs = [service.submit(f"{APP}/caption", {"image_url": dripping.url(n)}) for n in range(3)]
    wait_for(lambda: dripping.open == 3)
    for job in jobs:
        assert service.cancel(job)
    wait_for(lambda: dripping.open == 0)
    assert dripping.ended_early == 3
    wait_for(lambda: service.budget.num_bytes == 0)
    assert service.close(timeout=30)


def test_a_start_timeout_ends_the_download(model: Florence2, dripping: Dripping) -> None:
    service = make_service(model)
    job = service.submit(f"{APP}/caption", {"image_url": dripping.url(0)}, start_timeout=0.3)
    with pytest.raises(RequestError, match="timed out"):
        job.future.result(20)
    wait_for(lambda: dripping.open == 0)
    assert dripping.ended_early == 1
    assert service.close(timeout=30)


def test_a_host_that_drips_is_given_up(dripping: Dripping, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "RATE_GRACE_S", 0.3)
    with pytest.raises(ImageDownloadError, match="sends less than 1,000 bytes a second"):
        download(dripping.url(0), max_bytes=10**6, timeout=30, least_rate=1000)
    monkeypatch.setattr(connection, "RATE_GRACE_S", 60)
    threading.Timer(0.2, dripping.gate.set).start()
    assert download(dripping.url(0), max_bytes=10**6, timeout=30, least_rate=1000) == SAMPLE.read_bytes()


def test_a_transfer_counts_bytes_and_cannot_begin_once_cancelled(dripping: Dripping) -> None:
    dripping.gate.set()
    counted: list[int] = []
    content = download(dripping.url(0), max_bytes=10**6, timeout=30, transfer=Transfer(counted.append))
    assert sum(counted) == len(content)
    transfer = Transfer()
    transfer.cancel()
    with pytest.raises(ImageDownloadError, match="the download was cancelled"):
        download(dripping.url(0), max_bytes=10**6, timeout=30, transfer=transfer)


@pytest.mark.parametrize(
    "url, host",
    [
        ("http://A.example./x", "a.example"),
        ("https://a.example:99/", "a.example"),
        ("http://[::1", ""),
        ("http://", ""),
    ],
)
def test_the_host_of_a_url(url: str, host: str) -> None:
    assert host_of(url) == host


# ------------------------------------------------------------------------------------------------------- what is kept


def test_an_ended_request_keeps_its_answer_and_nothing_else(model: Florence2) -> None:
    service = make_service(model)
    jobs = [
        service.submit(f"{APP}/open-vocabulary-detection", arguments(tasks.OPEN_VOCABULARY_DETECTION)),
        service.submit(f"{APP}/caption", {"image_url": "data:image/png;base64,AAAA" + "A" * 100_000}),
        service.submit(f"{APP}/caption", {"image_url": 5, "text_input": "x" * 100_000}),
    ]
    for job in jobs:
        wait_for(job.future.done)
        wait_for(lambda job=job: job.arguments.image_url == "" and job.arguments.text_input is None)  # type: ignore[misc]
        assert job.content is job.image is job.features is None
    wait_for(lambda: service.budget.num_bytes == 0)
    assert service.close(timeout=30)


def test_a_waiting_request_keeps_no_address_once_its_image_is_loaded(slow: SlowModel) -> None:
    service = make_service(slow)
    first = occupy(service, slow)
    job = service.submit(f"{APP}/caption", arguments(tasks.CAPTION))
    wait_for(lambda: service._ready == [job])
    assert job.arguments.image_url == "" and job.content is None and job.image is not None
    assert service.budget.num_bytes < 1000
    slow.gate.set()
    assert first.future.result(60) and job.future.result(60)
    assert service.close(timeout=30)


def test_cached_features_are_held_for_a_request_that_was_loaded(slow: SlowModel) -> None:
    slow.gate.set()
    one = feature_cache._num_bytes(slow.encode(SAMPLE))
    service = make_service(slow, feature_cache_bytes=one + one // 2)  # of one image
    expected = service.submit(f"{APP}/caption", arguments(tasks.CAPTION)).future.result(60)
    slow.gate.clear()
    slow.entered.clear()
    first = occupy(service, slow)
    job = service.submit(f"{APP}/caption", arguments(tasks.CAPTION))
    wait_for(lambda: service._ready == [job])
    assert job.features is not None and job.image is None
    slow.gate.set()  # the features of the first evict those of the second
    assert first.future.result(60) and job.future.result(60).body == expected.body
    assert service.close(timeout=30)


@pytest.fixture
def slow(model: Florence2) -> Iterator[SlowModel]:
    made = SlowModel(model)
    yield made
    made.gate.set()


def test_requests_beyond_the_budget_are_refused_until_others_end(slow: SlowModel) -> None:
    size = len(arguments(tasks.CAPTION)["image_url"])
    service = make_service(slow, max_accepted_bytes=size * 2 + 1000, max_loaded=1)
    slow.gate.set()
    service.submit(f"{APP}/caption", arguments(tasks.CAPTION)).future.result(60)
    slow.gate.clear()
    slow.entered.clear()
    occupied = occupy(service, slow)
    waiting = [service.submit(f"{APP}/ocr", arguments(tasks.OCR))]
    wait_for(lambda: len(service._ready) == 1)  # no other image is loaded beside it
    waiting += [service.submit(f"{APP}/ocr", arguments(tasks.OCR)) for _ in range(2)]
    with pytest.raises(RequestError, match="try again later") as caught:
        service.submit(f"{APP}/ocr", arguments(tasks.OCR))
    assert (caught.value.status, caught.value.body["error_type"]) == (429, "concurrent_requests_limit")
    slow.gate.set()
    assert all(job.future.result(60) for job in (occupied, *waiting))
    assert service.submit(f"{APP}/ocr", arguments(tasks.OCR)).future.result(60)
    assert service.close(timeout=30)


def test_a_download_counts_for_the_budget(model: Florence2, dripping: Dripping) -> None:
    dripping.gate.set()
    size = SAMPLE.stat().st_size
    for budget, is_enough in ((size // 2, False), (2 * size + 1000, True)):
        service = make_service(model, max_accepted_bytes=budget)
        job = service.submit(f"{APP}/caption", {"image_url": dripping.url(0)})
        wait_for(job.future.done)
        assert (job.problem is None) == is_enough
        if job.problem is not None:
            assert job.problem.status == 429
        wait_for(lambda service=service: service.budget.num_bytes == 0)  # type: ignore[misc]
        assert service.close(timeout=30)


def test_a_charge_is_given_back_once() -> None:
    budget = ByteBudget(100)
    charge = budget.charge(60)
    with pytest.raises(RequestError):
        budget.charge(41)
    charge.grow(40)
    with pytest.raises(RequestError):
        charge.grow(1)
    assert budget.num_bytes == 100
    charge.shrink(30)
    charge.shrink(50)
    assert budget.num_bytes == 30
    charge.release()
    charge.release()
    charge.grow(7)
    assert budget.num_bytes == 0


# ------------------------------------------------------------------------------------------------------------- batches


class Picky(SlowModel):
    """Fails for the images of a size, in the encoder or in the decoder."""

    def __init__(self, model: Florence2, stage: str, error: Exception) -> None:
        super().__init__(model)
        self.stage, self.error = stage, error

    def encode(self, image: Any, **options: Any) -> Any:
        encoded = super().encode(image, **options)
        if self.stage == "encode" and image.size == (50, 40):
            raise self.error
        return encoded

    def run_batch(self, task: Any, images: Any, **options: Any) -> Any:
        if self.stage == "decode" and any(each.size == (50, 40) for each in images):
            self.batches.append(len(images))
            raise self.error
        return super().run_batch(task, images, **options)


@pytest.mark.parametrize("stage", ["encode", "decode"])
@pytest.mark.parametrize(
    "error, status", [(MemoryError("no memory"), 503), (RuntimeError("a bug"), 500)], ids=["memory", "bug"]
)
def test_an_image_that_fails_fails_alone(
    stage: str, error: Exception, status: int, model: Florence2, caplog: pytest.LogCaptureFixture
) -> None:
    from PIL import Image

    from florence_onnx import fal

    picky = Picky(model, stage, error)
    service = make_service(picky)
    first = occupy(service, picky)
    good = [service.submit(f"{APP}/caption", arguments(tasks.CAPTION, SAMPLES / f"scene-{n}.png")) for n in (1, 3)]
    bad = service.submit(f"{APP}/caption", {"image_url": fal.encode_image(Image.new("RGB", (50, 40)), "png")})
    wait_for(lambda: len(service._ready) == 3)
    picky.gate.set()
    assert [job.future.result(60).body["results"] for job in (first, *good)]
    assert isinstance(bad.future.exception(60), RequestError)
    assert bad.problem is not None and bad.problem.status == status
    assert str(error) in caplog.text
    assert max(picky.batches) >= 2
    assert service.submit(f"{APP}/caption", arguments(tasks.CAPTION)).future.result(60)
    assert service.close(timeout=30)


def test_no_thread_outlives_a_service(model: Florence2, dripping: Dripping) -> None:
    before = set(threading.enumerate())
    service = make_service(model)
    jobs = [service.submit(f"{APP}/caption", {"image_url": dripping.url(n)}) for n in range(6)]
    wait_for(lambda: dripping.open == 4)
    service.close(timeout=0)
    assert all(job.problem is not None and job.problem.status == 503 for job in jobs)
    wait_for(lambda: not any(thread.is_alive() for thread in set(threading.enumerate()) - before - handlers()))


def handlers() -> set[threading.Thread]:
    """The threads of the servers of this file."""
    return {thread for thread in threading.enumerate() if "process_request_thread" in thread.name}
