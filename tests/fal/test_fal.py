"""The in-process client: the names, results and errors of fal_client; and the service with its queue."""

from __future__ import annotations

import asyncio
import inspect
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from florence_onnx import EncodedImage, Florence2, Region, fal, tasks
from florence_onnx.fal import contract, problems
from florence_onnx.fal.images import ImageLimits
from florence_onnx.fal.jobs import Job
from florence_onnx.fal.problems import RequestError
from florence_onnx.fal.service import Service, ServiceSettings, without_image
from tests.shared_data import NO_SHARED

APP = "fal-ai/florence-2-large"
SAMPLES = Path(fal.__file__).parents[1] / "demo" / "samples"
SAMPLE = SAMPLES / "scene-1.png"
REGION = {"x1": 217, "y1": 475, "x2": 377, "y2": 648}


@pytest.fixture(scope="module")
def model() -> Florence2:
    return Florence2.from_pretrained("demo", device="cpu")


@pytest.fixture(scope="module", autouse=True)
def _configured(model: Florence2) -> Iterator[None]:
    fal.configure(model)
    yield
    fal.configure()


@pytest.fixture
def service(model: Florence2) -> Iterator[Service]:
    made = Service(model, ServiceSettings(max_batch=4), publish=without_image)
    yield made
    made.close(timeout=30)


def arguments(task: tasks.Task[Any], image: Path = SAMPLE) -> dict[str, Any]:
    """Valid arguments for the endpoint of a task."""
    needed: dict[str, Any] = {"text": {"text_input": "red circle"}, "region": {"region": REGION}}.get(task.needs, {})
    return {"image_url": fal.encode_file(image), **needed}


class SlowModel:
    """A real model whose encoder waits at a gate, so that requests queue up behind it; records the sizes of its batches."""

    max_batch = 0
    tasks = tasks.TASKS

    def __init__(self, model: Florence2) -> None:
        self._model = model
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.batches: list[int] = []
        self.num_encoded = 0
        self.check_prompt_bytes = model.check_prompt_bytes

    def encode(self, image: Any, *, copy: bool = True) -> Any:
        self.num_encoded += 1
        self.entered.set()
        self.gate.wait(30)
        return self._model.encode(image, copy=copy)

    def run_batch(self, *args: Any, **options: Any) -> Any:
        self.batches.append(len(args[1]))
        return self._model.run_batch(*args, **options)


@pytest.fixture
def slow(model: Florence2) -> Iterator[SlowModel]:
    made = SlowModel(model)
    yield made
    made.gate.set()


def occupy(service: Service, slow: SlowModel) -> Job:
    """Submits a request that the model runs until the gate opens."""
    job = service.submit(f"{APP}/caption", arguments(tasks.CAPTION, SAMPLES / "scene-2.png"))
    assert slow.entered.wait(10)
    return job


# ------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("task", tasks.TASKS.values(), ids=lambda task: task.slug)
def test_every_endpoint_returns_the_result_of_the_model(task: tasks.Task[Any], model: Florence2) -> None:
    asked = arguments(task)
    direct = model.run(
        task, SAMPLE, text_input=asked.get("text_input"), region=Region(**REGION) if "region" in asked else None
    )
    assert fal.run(f"{APP}/{task.slug}", asked) == direct.to_dict(with_image=True)


def test_names_and_arguments_are_those_of_fal_client() -> None:
    fal_client = pytest.importorskip("fal_client", reason="pip install fal-client")
    for name in ("run", "subscribe", "submit", "status", "result", "cancel"):
        theirs = inspect.signature(getattr(fal_client, name)).parameters
        ours = inspect.signature(getattr(fal, name)).parameters
        assert list(ours) == list(theirs), name
        assert [p.kind for p in ours.values()] == [p.kind for p in theirs.values()], name
    for name in ("run_async", "subscribe_async", "submit_async", "status_async", "result_async", "cancel_async"):
        assert inspect.iscoroutinefunction(getattr(fal, name)), name
    for name in ("Queued", "InProgress", "Completed", "FalClientHTTPError", "FalClientTimeoutError"):
        theirs = inspect.signature(getattr(fal_client, name)).parameters
        assert list(inspect.signature(getattr(fal, name)).parameters) == list(theirs), name
    assert fal.encode_file(SAMPLE) == fal_client.encode_file(SAMPLE)
    assert fal.encode("a", "text/plain") == fal_client.encode("a", "text/plain")
    with Image.open(SAMPLE) as image:
        assert fal.encode_image(image, "png") == fal_client.encode_image(image, "png")


def test_images_can_be_left_out(model: Florence2) -> None:
    fal.configure(model, images=False)
    assert fal.run(f"{APP}/object-detection", arguments(tasks.OBJECT_DETECTION))["image"] is None
    fal.configure(model)


def test_subscribe_reports_states_and_logs() -> None:
    ids: list[str] = []
    states: list[fal.Status] = []
    answer = fal.subscribe(
        f"{APP}/caption", arguments(tasks.CAPTION), with_logs=True, on_enqueue=ids.append, on_queue_update=states.append
    )
    assert answer == {"results": "Two circles, a star and the word ROCKET."}
    completed = states[-1]
    assert isinstance(completed, fal.Completed)
    assert completed.metrics["inference_time"] > 0
    assert [line["message"].split()[0] for line in completed.logs or []] == ["started", "finished"]
    assert fal.result(f"{APP}/caption", ids[0]) == answer
    assert isinstance(fal.status(APP, ids[0]), fal.Completed)


def test_submit_and_path() -> None:
    handle = fal.submit(APP, arguments(tasks.CAPTION), path="/caption", priority="low")
    assert handle.get() == {"results": "Two circles, a star and the word ROCKET."}
    assert fal.SyncClient.get_handle(fal.run.__self__, APP, handle.request_id).get() == handle.get()  # type: ignore[attr-defined]


def test_async_variants() -> None:
    async def ask() -> None:
        seen: list[fal.Status] = []

        async def note(status: fal.Status) -> None:
            seen.append(status)

        asked = arguments(tasks.CAPTION)
        expected = {"results": "Two circles, a star and the word ROCKET."}
        assert await fal.run_async(f"{APP}/caption", asked) == expected
        assert await fal.subscribe_async(f"{APP}/caption", asked, on_queue_update=note, client_timeout=60) == expected
        assert isinstance(seen[-1], fal.Completed)
        handle = await fal.submit_async(f"{APP}/caption", asked)
        assert await fal.result_async(f"{APP}/caption", handle.request_id) == expected
        assert isinstance(await fal.status_async(f"{APP}/caption", handle.request_id), fal.Completed)
        with pytest.raises(fal.FalClientHTTPError, match="ALREADY_COMPLETED"):
            await fal.cancel_async(f"{APP}/caption", handle.request_id)

    asyncio.run(ask())


def test_uploads_return_a_url_that_endpoints_accept() -> None:
    address = fal.upload_file(SAMPLE)
    assert fal.run(f"{APP}/caption", {"image_url": address}) == fal.run(f"{APP}/caption", arguments(tasks.CAPTION))


def test_the_model_is_loaded_once_and_chosen_by_the_environment(
    monkeypatch: pytest.MonkeyPatch, model: Florence2
) -> None:
    monkeypatch.setenv("FLORENCE_ONNX_MODEL", "demo")
    fal.configure(device="cpu")
    threads = [threading.Thread(target=fal.run, args=(f"{APP}/caption", arguments(tasks.CAPTION))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loaded = fal.run.__self__.service.model  # type: ignore[attr-defined]
    assert loaded is not model
    assert loaded.info()["path"].endswith("bundle")
    fal.configure(model)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("slug", "sent", "found"),
    [
        ("caption", {}, [("image_url", "missing")]),
        ("caption", {"image_url": 5}, [("image_url", "string_type")]),
        ("caption", {"image_url": "scene-1.png"}, [("image_url", "file_download_error")]),
        ("caption", {"image_url": "file:///etc/passwd"}, [("image_url", "file_download_error")]),
        ("caption", {"image_url": "data:image/png;base64,AAAA"}, [("image_url", "image_load_error")]),
        ("caption", {"image_url": "data:image/png;base64,%%%"}, [("image_url", "image_load_error")]),
        ("open-vocabulary-detection", {"text_prompt": "x"}, [("image_url", "missing"), ("text_input", "missing")]),
        ("open-vocabulary-detection", {"image_url": "x", "text_input": " "}, [("text_input", "value_error")]),
        ("open-vocabulary-detection", {"image_url": "x", "text_input": "\ud800"}, [("text_input", "value_error")]),
        ("region-to-category", {"image_url": "x", "region": [1, 2, 3, 4]}, [("region", "dict_type")]),
        (
            "region-to-category",
            {"image_url": "x", "region": {"x1": -1, "y1": 1000, "x2": 2.5}},
            [
                ("region.x1", "greater_than_equal"),
                ("region.y1", "less_than_equal"),
                ("region.x2", "int_type"),
                ("region.y2", "missing"),
            ],
        ),
        (
            "region-to-category",
            {"image_url": "x", "region": {**REGION, "x1": float("nan")}},
            [("region.x1", "int_type")],
        ),
        ("region-to-category", {"image_url": "x", "region": {**REGION, "x1": True}}, [("region.x1", "int_type")]),
        ("region-to-category", {"image_url": "x", "region": {**REGION, "x1": 900}}, [("region", "value_error")]),
    ],
)
def test_invalid_arguments_give_fals_422(slug: str, sent: dict[str, Any], found: list[tuple[str, str]]) -> None:
    with pytest.raises(fal.FalClientHTTPError) as caught:
        fal.run(f"{APP}/{slug}", sent)
    error = caught.value
    assert error.status_code == 422
    assert [(".".join(each["loc"][1:]), each["type"]) for each in error.message] == found
    assert all(each["loc"][0] == "body" and each["url"].endswith(each["type"]) for each in error.message)
    assert error.response.json() == {"detail": error.message}


def test_whole_floats_are_integers() -> None:
    as_floats = {name: float(value) for name, value in REGION.items()}
    asked = {**arguments(tasks.REGION_TO_CATEGORY), "region": as_floats}
    assert fal.run(f"{APP}/region-to-category", asked) == fal.run(
        f"{APP}/region-to-category", arguments(tasks.REGION_TO_CATEGORY)
    )


def test_a_text_too_long_for_the_model_fails_alone(service: Service) -> None:
    long = {**arguments(tasks.OPEN_VOCABULARY_DETECTION), "text_input": "a red circle " * 500}
    jobs = [
        service.submit(f"{APP}/open-vocabulary-detection", asked)
        for asked in (arguments(tasks.OPEN_VOCABULARY_DETECTION), long, arguments(tasks.OPEN_VOCABULARY_DETECTION))
    ]
    assert jobs[0].future.result(60).body == jobs[2].future.result(60).body
    with pytest.raises(RequestError, match="shorten text_input"):
        jobs[1].future.result(60)
    assert jobs[1].problem is not None and jobs[1].problem.body["detail"][0]["loc"] == ["body", "text_input"]


def test_limits_of_images(model: Florence2) -> None:
    limits = ImageLimits(max_bytes=20_000, max_pixels=100_000)
    service = Service(model, ServiceSettings(image_limits=limits))
    large = service.submit(f"{APP}/caption", {"image_url": fal.encode_image(Image.new("RGB", (400, 300)), "png")})
    noise = Image.effect_noise((200, 200), 90).convert("RGB")
    heavy = service.submit(f"{APP}/caption", {"image_url": fal.encode_image(noise, "png")})
    for job, kind in ((large, "image_too_large"), (heavy, "file_too_large")):
        with pytest.raises(RequestError):
            job.future.result(30)
        assert job.problem is not None
        assert job.problem.body["detail"][0]["type"] == kind
    assert service.close(timeout=30)


@pytest.mark.parametrize("application", ["fal-ai/florence-2-large", f"{APP}/od", "fal-ai/other/caption", "caption"])
def test_unknown_endpoints_are_404(application: str) -> None:
    with pytest.raises(fal.FalClientHTTPError, match="not found") as caught:
        fal.run(application, {})
    assert caught.value.status_code == 404


def test_unsupported_features_are_refused() -> None:
    with pytest.raises(fal.FalClientHTTPError, match="webhooks are not supported"):
        fal.submit(f"{APP}/caption", {}, webhook_url="https://example.com")
    with pytest.raises(fal.FalClientHTTPError, match="not found"):
        fal.result(APP, "no-such-request")
    with pytest.raises(fal.FalClientHTTPError) as caught:
        fal.run(f"{APP}/caption", {}, method="GET")
    assert caught.value.status_code == 405


def test_a_start_timeout_beyond_the_client_timeout_warns() -> None:
    with pytest.warns(UserWarning, match="larger than client_timeout"):
        fal.subscribe(f"{APP}/caption", arguments(tasks.CAPTION), start_timeout=99, client_timeout=60)


# --------------------------------------------------------------------------------------------------------------- queue


def test_waiting_requests_run_as_one_batch_and_an_image_is_encoded_once(slow: SlowModel) -> None:
    service = Service(slow, ServiceSettings(max_batch=8), publish=without_image)  # type: ignore[arg-type]
    first = occupy(service, slow)
    slugs = ["caption", "object-detection", "ocr", "region-to-category"]
    jobs = [service.submit(f"{APP}/{slug}", arguments(tasks.TASKS[slug])) for slug in slugs]
    wait_for(lambda: len(service._ready) == 4)
    assert [service.position(job) for job in jobs] == [0, 1, 2, 3]
    slow.gate.set()
    answers = [job.future.result(60).body["results"] for job in (first, *jobs)]
    assert slow.batches == [1, 4]
    assert slow.num_encoded == 2
    assert answers[1:] == [fal.run(f"{APP}/{slug}", arguments(tasks.TASKS[slug]))["results"] for slug in slugs]
    stats = service.stats()
    assert (stats.encoded, stats.reused, stats.finished, stats.batches) == (2, 3, 5, 2)
    assert service.close(timeout=30)


def test_image_features_are_cached_within_the_limit(model: Florence2) -> None:
    service = Service(model, publish=without_image)
    for _ in range(2):
        service.submit(f"{APP}/caption", arguments(tasks.CAPTION)).future.result(60)
    assert (service.stats().encoded, service.stats().reused) == (1, 1)
    service.close()
    uncached = Service(model, ServiceSettings(feature_cache_bytes=0), publish=without_image)
    for _ in range(2):
        uncached.submit(f"{APP}/caption", arguments(tasks.CAPTION)).future.result(60)
    assert (uncached.stats().encoded, uncached.stats().reused) == (2, 0)
    uncached.close()


def test_low_priority_waits_for_normal(slow: SlowModel) -> None:
    service = Service(slow, ServiceSettings(max_batch=1), publish=without_image)  # type: ignore[arg-type]
    occupy(service, slow)
    low = service.submit(f"{APP}/caption", arguments(tasks.CAPTION), priority="low")
    normal = service.submit(f"{APP}/ocr", arguments(tasks.OCR))
    assert (service.position(normal), service.position(low)) == (0, 1)
    ended: list[Job] = []
    low.listen(lambda: ended.append(low) if low.state == "COMPLETED" else None)
    normal.listen(lambda: ended.append(normal) if normal.state == "COMPLETED" else None)
    wait_for(lambda: len(service._ready) == 2)
    slow.gate.set()
    assert service.close(timeout=60)
    assert ended[0] is normal


def test_a_full_queue_refuses_and_accepts_again(slow: SlowModel) -> None:
    service = Service(slow, ServiceSettings(max_waiting=2), publish=without_image)  # type: ignore[arg-type]
    occupy(service, slow)
    waiting = [service.submit(f"{APP}/caption", arguments(tasks.CAPTION)) for _ in range(2)]
    with pytest.raises(RequestError) as caught:
        service.submit(f"{APP}/caption", arguments(tasks.CAPTION))
    assert (caught.value.status, caught.value.body["error_type"]) == (429, "concurrent_requests_limit")
    slow.gate.set()
    assert [job.future.result(60).body for job in waiting]
    assert service.submit(f"{APP}/caption", arguments(tasks.CAPTION)).future.result(60)
    assert service.close(timeout=30)


def test_a_waiting_request_ends_at_its_start_timeout_and_when_cancelled(slow: SlowModel) -> None:
    service = Service(slow, publish=without_image)  # type: ignore[arg-type]
    first = occupy(service, slow)
    late = service.submit(f"{APP}/caption", arguments(tasks.CAPTION), start_timeout=0.2)
    cancelled = service.submit(f"{APP}/caption", arguments(tasks.CAPTION))
    assert service.cancel(cancelled)
    assert not service.cancel(cancelled)
    with pytest.raises(RequestError) as caught:
        late.future.result(10)
    assert (caught.value.status, caught.value.headers[problems.TIMEOUT_TYPE_HEADER]) == (504, "user")
    with pytest.raises(RequestError) as caught:
        cancelled.future.result(1)
    assert caught.value.status == 499
    assert service.cancel(first)  # in progress: its result is discarded
    slow.gate.set()
    assert service.close(timeout=30)
    assert slow.batches == []


@pytest.mark.parametrize("max_batch", [0, 4], ids=["host", "continuous batching"])
def test_a_cancelled_request_leaves_the_batch_at_the_next_step(max_batch: int) -> None:
    """Two requests of one batch; one is cancelled in its fourth step, and the other gets its whole answer."""
    model = Florence2.from_pretrained("demo", device="cpu", max_batch=max_batch)
    expected = model.run("<OD>", SAMPLES / "scene-2.png").to_dict()
    service = Service(model, ServiceSettings(workers=1), publish=without_image)
    decoder = model._text_model._decoder  # type: ignore[attr-defined]
    jobs: list[Job] = []
    steps: list[list[int]] = [[], []]  # the decoder runs after which each answer had grown
    is_ready = threading.Event()

    def follow(number: int) -> Callable[..., None]:
        def listen(token_ids: Sequence[int], image: EncodedImage) -> None:
            steps[number].append(decoder.num_runs)
            if number == 0 and len(steps[0]) == 4:
                assert service.cancel(jobs[0])

        return listen

    first = service.submit(f"{APP}/caption", arguments(tasks.CAPTION))  # occupies the only worker
    hold = first.listen(lambda: is_ready.wait(30) and None)
    for number, name in enumerate(("scene-1.png", "scene-2.png")):
        asked = arguments(tasks.OBJECT_DETECTION, SAMPLES / name)
        jobs.append(service.submit(f"{APP}/object-detection", asked, on_tokens=follow(number)))
    is_ready.set()
    hold()
    assert jobs[1].future.result(60).body == expected
    with pytest.raises(RequestError) as caught:
        jobs[0].future.result(60)
    assert caught.value.status == 499
    assert service.close(timeout=30)
    assert len(steps[0]) == 4 < len(steps[1])
    assert steps[0][-1] - steps[0][0] == 3, "one decoder run each"
    assert service.stats().in_progress == 0


def test_the_start_timeout_holds_while_the_image_is_downloaded(model: Florence2) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never responds
        service = Service(model, ServiceSettings(image_limits=ImageLimits(timeout=3.0)), publish=without_image)
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/x.png"
        begin = time.monotonic()
        job = service.submit(f"{APP}/caption", {"image_url": address}, start_timeout=0.2)
        with pytest.raises(RequestError) as caught:
            job.future.result(10)
        assert caught.value.status == 504
        assert time.monotonic() - begin < 2.5
        assert service.close(timeout=30)


def test_a_client_timeout_frees_the_place_in_the_queue(slow: SlowModel) -> None:
    fal.configure(slow)  # type: ignore[arg-type]
    client: fal.SyncClient = fal.run.__self__  # type: ignore[attr-defined]
    client._service = Service(slow, publish=without_image)  # type: ignore[arg-type]
    occupy(client.service, slow)
    with pytest.raises(fal.FalClientTimeoutError, match=r"timed out after 0\.2 seconds"):
        fal.subscribe(f"{APP}/caption", arguments(tasks.CAPTION), client_timeout=0.2)
    with pytest.raises(fal.FalClientTimeoutError):
        fal.run(f"{APP}/caption", arguments(tasks.CAPTION), timeout=0.2)
    wait_for(lambda: client.service.stats().waiting == 0)
    handle = fal.submit(f"{APP}/caption", arguments(tasks.CAPTION))
    assert isinstance(handle.status(), fal.Queued)
    handle.cancel()
    assert isinstance(handle.status(), fal.Completed)
    with pytest.raises(fal.FalClientHTTPError) as caught:
        handle.get()
    assert (caught.value.status_code, caught.value.error_type) == (499, "client_cancelled")
    slow.gate.set()


def test_closing_finishes_accepted_requests(slow: SlowModel) -> None:
    service = Service(slow, publish=without_image)  # type: ignore[arg-type]
    jobs = [occupy(service, slow), *(service.submit(f"{APP}/ocr", arguments(tasks.OCR)) for _ in range(5))]
    closing = threading.Thread(target=service.close)
    closing.start()
    wait_for(lambda: not service._is_open)
    with pytest.raises(RequestError) as caught:
        service.submit(f"{APP}/caption", arguments(tasks.CAPTION))
    assert caught.value.status == 503
    slow.gate.set()
    closing.join(60)
    assert all(job.future.result(0) for job in jobs)
    assert not any(thread.is_alive() for thread in service._threads)


def test_closing_with_a_timeout_fails_the_rest(slow: SlowModel) -> None:
    service = Service(slow, publish=without_image)  # type: ignore[arg-type]
    jobs = [occupy(service, slow), service.submit(f"{APP}/ocr", arguments(tasks.OCR))]
    assert not service.close(timeout=0.1)
    for job in jobs:
        assert job.problem is not None and job.problem.status == 503


def test_a_failure_of_the_model_is_a_500_and_the_next_request_works(
    model: Florence2, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(SlowModel):
        def run_batch(self, *args: Any, **options: Any) -> Any:
            if len(self.batches) == 0:
                self.batches.append(0)
                raise RuntimeError("out of luck")
            return super().run_batch(*args, **options)

    failing = Failing(model)
    failing.gate.set()
    service = Service(failing, publish=without_image)  # type: ignore[arg-type]
    with pytest.raises(RequestError) as caught:
        service.submit(f"{APP}/caption", arguments(tasks.CAPTION)).future.result(30)
    assert (caught.value.status, caught.value.body["detail"]) == (500, "Internal Server Error")
    assert "out of luck" in caplog.text
    assert service.submit(f"{APP}/caption", arguments(tasks.CAPTION)).future.result(30)
    assert service.close(timeout=30)


def test_endpoints_are_those_of_fal_and_one_more() -> None:
    slugs = (SHARED / "reference" / "fal.md").read_text(encoding="utf-8") if SHARED.is_dir() else None
    if slugs is None:
        pytest.skip(NO_SHARED)
    for slug in tasks.TASKS:
        assert slug == "region-to-ocr" or f"`{slug}`" in slugs
        assert contract.find_task(f"{APP}/{slug}").slug == slug


SHARED = Path(__file__).resolve().parents[3] / "shared"


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    """Waits until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition did not hold within {seconds} s"
        time.sleep(0.005)
