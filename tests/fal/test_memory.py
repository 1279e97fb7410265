"""Images are admitted by the bytes that they take once they are decoded."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from florence_onnx import fal
from florence_onnx.errors import ImageTooLargeError
from florence_onnx.fal.images import ImageLimits
from florence_onnx.fal.memory import MemoryBudget, NotWantedError
from florence_onnx.fal.problems import RequestError
from florence_onnx.fal.service import Service, ServiceSettings
from florence_onnx.model import Florence2
from tests import hostile_images as hostile
from tests.fal.test_fal import APP, SlowModel, wait_for

SIDE = 500
RGB = 4 * SIDE**2


@pytest.fixture(scope="module")
def model() -> Florence2:
    return Florence2.from_pretrained("demo", device="cpu")


@pytest.fixture
def slow(model: Florence2) -> Iterator[SlowModel]:
    made = SlowModel(model)
    yield made
    made.gate.set()


def request(shade: int, side: int = SIDE) -> dict[str, Any]:
    """A request for an image that no other one has."""
    return {
        "image_url": fal.encode(
            hostile.with_chunks(hostile.png(side, side), hostile.chunk(b"teSt", bytes([shade]))), ""
        )
    }


def test_bytes_are_taken_in_the_order_of_asking() -> None:
    budget = MemoryBudget(100)
    budget.take(60, lambda: True)
    order: list[int] = []

    def ask(num_bytes: int) -> None:
        budget.take(num_bytes, lambda: True)
        order.append(num_bytes)

    with ThreadPoolExecutor(2) as pool:
        large = pool.submit(ask, 90)
        wait_for(lambda: len(budget._queue) == 1)
        small = pool.submit(ask, 10)  # there is room, but the large one was first
        wait_for(lambda: len(budget._queue) == 2)
        assert order == []
        budget.give(60)
        large.result(10)
        small.result(10)
    assert order == [90, 10]
    assert budget.taken == 100


def test_more_than_there_will_ever_be_is_refused() -> None:
    with pytest.raises(ImageTooLargeError, match="takes 2 MiB to decode, allowed are 1 MiB"):
        MemoryBudget(2**20).take(2 * 2**20, lambda: True)


def test_who_is_not_wanted_any_more_does_not_wait() -> None:
    budget, wanted = MemoryBudget(10), threading.Event()
    budget.take(10, lambda: True)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(budget.take, 1, lambda: not wanted.is_set())
        wait_for(lambda: len(budget._queue) == 1)
        wanted.set()
        budget.look()
        with pytest.raises(NotWantedError):
            waiting.result(10)
    assert (budget.taken, len(budget._queue)) == (10, 0)


@pytest.mark.parametrize("num_processes", [0, 2])
def test_many_large_images_take_no_more_than_the_budget(num_processes: int, slow: SlowModel) -> None:
    """32 images where there is room for three; while the model is busy, the others wait undecoded."""
    settings = ServiceSettings(
        image_limits=ImageLimits(num_processes=num_processes),
        max_decoded_bytes=4 * RGB,
        feature_cache_bytes=0,
        max_loaded=64,
        loaders=4,
    )
    service = Service(slow, settings, publish=lambda prediction: None)  # type: ignore[arg-type]
    try:
        jobs = [service.submit(f"{APP}/caption", request(shade)) for shade in range(32)]
        assert slow.entered.wait(30)
        wait_for(lambda: service._memory.taken + 6 * SIDE**2 > 4 * RGB)
        with service._condition:
            loaded = len(service._ready) + len(service._running)
        assert 1 <= loaded <= 3
        most = service._memory.taken
        slow.gate.set()
        for job in jobs:
            assert job.future.result(60).body["results"]
            most = max(most, service._memory.taken)
        assert most <= 4 * RGB
    finally:
        slow.gate.set()
        service.close(30)
    del jobs, job
    gc.collect()
    assert service._memory.taken == 0


def test_drawing_on_an_image_is_counted_until_the_request_ends(slow: SlowModel) -> None:
    service = Service(slow, ServiceSettings(feature_cache_bytes=0))  # type: ignore[arg-type]
    try:
        job = service.submit(f"{APP}/object-detection", request(1))
        assert slow.entered.wait(30)
        assert service._memory.taken == 2 * RGB
        slow.gate.set()
        job.future.result(30)
        gc.collect()
        wait_for(lambda: service._memory.taken == 0)
    finally:
        slow.gate.set()
        service.close(30)


def test_an_image_that_has_no_room_at_all_is_refused(model: Florence2) -> None:
    settings = ServiceSettings(max_decoded_bytes=2**20, feature_cache_bytes=0)
    service = Service(model, settings)
    try:
        with pytest.raises(RequestError, match="MiB to decode, allowed are 1 MiB") as caught:
            service.submit(f"{APP}/caption", request(1)).future.result(30)
        assert (caught.value.status, caught.value.body["detail"][0]["type"]) == (422, "image_too_large")
        assert service.submit(f"{APP}/caption", request(1, 64)).future.result(30).body["results"]
    finally:
        service.close(30)


def test_a_cancelled_request_ends_its_decoding(model: Florence2) -> None:
    """One process, which is busy with an image that takes long; then it is cancelled, and the next one is answered."""
    service = Service(model, ServiceSettings(image_limits=ImageLimits(num_processes=1, decode_seconds=600), loaders=2))
    try:
        asked = {"image_url": fal.encode(hostile.many_scans(7000, 32), "image/jpeg")}
        job = service.submit(f"{APP}/caption", asked)
        wait_for(lambda: service._memory.taken > 0)
        next_job = service.submit(f"{APP}/caption", request(1, 64))
        assert service.cancel(job)
        assert next_job.future.result(60).body["results"]
        assert job.problem is not None and job.problem.status == 499
        wait_for(lambda: not service._loading)
    finally:
        service.close(30)
