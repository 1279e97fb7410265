"""Fields that fal's API does not have: deadlines, scores, lists of classes and tiles, through the server and the queue."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="pip install -e '.[test]'")
for needed in ("fastapi", "uvicorn", "prometheus_client", "pythonjsonlogger"):
    pytest.importorskip(needed, reason="pip install -e '.[serve]'")

from PIL import Image  # noqa: E402

from florence_onnx import Florence2, GenerationOptions, Tiles, fal, tasks  # noqa: E402
from florence_onnx.fal import extensions  # noqa: E402
from tests.fal.test_fal import APP, SAMPLE, arguments  # noqa: E402
from tests.live_server import LiveServer, serve  # noqa: E402

EXTRA = {"X-Florence-Extra": "1"}
SCORED = GenerationOptions(scores=True)
CLASSES = ["red circle", "green square", "a blue star"]
IMAGE_URL = fal.encode_file(SAMPLE)


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    given = ("--images", "data", "--grace", "1")
    with serve(*given, environment={"OMP_NUM_THREADS": "1"}) as running:
        yield running


@pytest.fixture(scope="module")
def model() -> Florence2:
    return Florence2.from_pretrained("demo", device="cpu", session_options={"intra_op_num_threads": 1})


def post(server: LiveServer, slug: str, **given: Any) -> Any:
    return httpx.post(f"{server.url}/{APP}/{slug}", json={"image_url": IMAGE_URL, **given}, headers=EXTRA, timeout=60)


def sheet(width: int = 700, height: int = 500) -> str:
    """A large image with the sample in a corner."""
    image = Image.new("RGB", (width, height), (230, 230, 230))
    image.paste(Image.open(SAMPLE).convert("RGB").resize((250, 230)), (width - 260, height - 240))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_without_them_nothing_changes(server: LiveServer) -> None:
    plain, given = (
        httpx.post(f"{server.url}/{APP}/object-detection", json={"image_url": IMAGE_URL, **more}, timeout=60)
        for more in ({}, {"deadline": 60, "scores": True, "min_score": 0})
    )
    assert plain.content == given.content
    assert "scores" not in post(server, "object-detection").json()["extra"]


def test_scores_and_the_least_one(server: LiveServer, model: Florence2) -> None:
    expected = model.run(tasks.OBJECT_DETECTION, SAMPLE, options=SCORED).results.bboxes
    scores = post(server, "object-detection", scores=True).json()["extra"]["scores"]
    assert scores == pytest.approx([box.score for box in expected], rel=1e-3)
    least = sorted(scores)[1]
    cut = post(server, "object-detection", min_score=least * 0.999).json()
    assert [box["label"] for box in cut["results"]["bboxes"]] == [
        box.label for box in expected if (box.score or 0) >= least * 0.999
    ]
    assert min(cut["extra"]["scores"]) >= least * 0.999 and len(cut["extra"]["scores"]) == 2


def test_a_list_of_classes(server: LiveServer, model: Florence2) -> None:
    expected = model.detect(SAMPLE, CLASSES)
    found = post(server, "open-vocabulary-detection", classes=CLASSES).json()
    assert [box["label"] for box in found["results"]["bboxes"]] == [box.label for box in expected.bboxes]
    assert list(found["extra"]["presence"]) == CLASSES
    for each in expected.classes:
        value = found["extra"]["presence"][each.name]
        assert value is None if each.presence is None else value == pytest.approx(each.presence, rel=1e-2)
    assert found["extra"]["scores"] == pytest.approx([box.score for box in expected.bboxes], rel=1e-3)
    assert found["image"]["width"] == model.encode(SAMPLE).size[0]
    all_kept = post(server, "open-vocabulary-detection", classes=CLASSES, absent="off", nms=1, min_score=0).json()
    assert len(all_kept["results"]["bboxes"]) >= len(found["results"]["bboxes"])
    assert set(all_kept["extra"]["presence"].values()) == {None}


def test_a_list_of_classes_through_the_queue_and_as_a_stream(server: LiveServer) -> None:
    asked, path = {"image_url": IMAGE_URL, "classes": CLASSES}, f"{APP}/open-vocabulary-detection"
    direct = httpx.post(f"{server.url}/{path}", json=asked, timeout=60).json()
    submitted = httpx.post(f"{server.url}/queue/{path}", json=asked).json()
    while httpx.get(submitted["status_url"]).json()["status"] != "COMPLETED":
        time.sleep(0.05)
    assert httpx.get(submitted["response_url"]).json() == direct
    text = httpx.post(f"{server.url}/{path}/stream", json=asked, timeout=60).text
    last = [line for line in text.splitlines() if line.startswith("data: ")][-1]
    assert httpx.Response(200, text=last[6:]).json() == direct


@pytest.mark.parametrize("given", [{"min_score": 0.1075}, {"tiles": {"size": 250}}, {"deadline": 0}, {"scores": True}])
def test_the_parts_of_a_stream_are_its_result(server: LiveServer, given: dict[str, Any]) -> None:
    """Also of boxes that are dropped, or merged, when all are known."""
    asked = {"image_url": sheet() if "tiles" in given else IMAGE_URL, **given}
    text = httpx.post(f"{server.url}/{APP}/object-detection/stream", json=asked, headers=EXTRA, timeout=60).text
    *parts, last = [
        httpx.Response(200, text=line[6:]).json() for line in text.splitlines() if line.startswith("data: ")
    ]
    assert [part["item"] for part in parts if part["part"] == "box"] == last["results"]["bboxes"]
    if "min_score" in given:
        assert 0 < len(last["results"]["bboxes"]) < 3


@pytest.mark.parametrize("slug", ["object-detection", "ocr", "ocr-with-region"])
def test_tiles(server: LiveServer, model: Florence2, slug: str) -> None:
    image = sheet()
    found = post(server, slug, image_url=image, tiles={"size": 250, "overlap": 0.3}).json()
    expected = model.run(slug, Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))), tiles=Tiles(250, 0.3))
    assert found["results"] == expected.to_dict()["results"]
    assert found["results"] if slug == "ocr" else any(found["results"].values())


def test_a_deadline_that_has_passed_and_one_far_away(server: LiveServer) -> None:
    for slug in ("object-detection", "caption"):
        over = post(server, slug, deadline=0).json()
        assert over["extra"]["truncated"] == "deadline"
        assert over["results"] in ({"bboxes": []}, "")
        assert post(server, slug, deadline=3600).json()["extra"]["truncated"] is False
    over = post(server, "open-vocabulary-detection", classes=CLASSES, deadline=0).json()
    assert over["extra"]["truncated"] == "deadline" and over["results"] == {"bboxes": []}
    tiled = post(server, "object-detection", image_url=sheet(), tiles={"size": 250}, deadline=0).json()
    assert tiled["extra"]["truncated"] == "deadline"


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("object-detection", {"deadline": -1}, "deadline"),
    ("object-detection", {"deadline": "1"}, "deadline"),
    ("object-detection", {"deadline": True}, "deadline"),
    ("object-detection", {"deadline": 1e9}, "deadline"),
    ("object-detection", {"scores": 1}, "scores"),
    ("object-detection", {"min_score": 1.5}, "min_score"),
    ("caption", {"min_score": 0.5}, "min_score"),
    ("object-detection", {"classes": ["car"]}, "classes"),
    ("referring-expression-segmentation", {"classes": ["car"]}, "classes"),
    ("open-vocabulary-detection", {"classes": []}, "classes"),
    ("open-vocabulary-detection", {"classes": "car"}, "classes"),
    ("open-vocabulary-detection", {"classes": ["car", " "]}, "classes"),
    ("open-vocabulary-detection", {"classes": ["car", 7]}, "classes"),
    ("open-vocabulary-detection", {"classes": ["x" * 100_000]}, "classes"),
    ("open-vocabulary-detection", {"classes": ["a " * 1500]}, "classes"),
    ("open-vocabulary-detection", {"classes": [f"thing {n}" for n in range(33)]}, "classes"),
    ("open-vocabulary-detection", {"classes": ["car"], "absent": "never"}, "absent"),
    ("open-vocabulary-detection", {"classes": ["car"], "absent": "likelihood"}, "absent"),
    ("open-vocabulary-detection", {"classes": ["car"], "nms": 2}, "nms"),
    ("object-detection", {"tiles": 768}, "tiles"),
    ("object-detection", {"tiles": {"size": 8}}, "tiles"),
    ("object-detection", {"tiles": {"size": 250, "overlap": 0.9}}, "tiles"),
    ("object-detection", {"tiles": {"size": 250, "padding": 3}}, "tiles"),
    ("object-detection", {"tiles": {"size": 250, "whole": 1}}, "tiles"),
    ("caption", {"tiles": {"size": 250}}, "tiles"),
    ("object-detection", {"tiles": {"size": 32, "overlap": 0.75}, "image_url": sheet()}, "tiles"),
]


@pytest.mark.parametrize(("slug", "given", "name"), WRONG)
def test_wrong_values_are_named(server: LiveServer, slug: str, given: dict[str, Any], name: str) -> None:
    response = post(server, slug, **given)
    assert response.status_code == 422, response.text
    assert any(name in error["loc"] for error in response.json()["detail"]), response.text
    assert all(error["msg"] for error in response.json()["detail"])


def test_an_image_with_many_tiles_is_refused_before_it_is_cut() -> None:
    def check(tiles: Tiles, size: tuple[int, int], count: int = 0) -> str | None:
        names = tuple(f"thing {number}" for number in range(count))
        return extensions.check_num_tiles(extensions.Extensions(classes=names, tiles=tiles), size)

    assert check(Tiles(32, 0.75), (4000, 4000)) is not None
    assert check(Tiles(768), (4000, 4000)) is None and check(Tiles(768), (700, 700)) is None
    assert check(Tiles(768), (4000, 4000), 6) is None
    assert "at most 8 are allowed with 32 classes" in (check(Tiles(768), (4000, 4000), 32) or "")


def test_requests_of_all_kinds_beside_one_another(server: LiveServer) -> None:
    """Single requests and batches take turns, and none gets another's answer."""
    from concurrent.futures import ThreadPoolExecutor

    kinds: list[tuple[str, dict[str, Any]]] = [
        ("object-detection", {}),
        ("open-vocabulary-detection", {"classes": CLASSES}),
        ("object-detection", {"scores": True}),
        ("object-detection", {"image_url": sheet(), "tiles": {"size": 250}}),
        ("caption", {}),
        ("open-vocabulary-detection", {"text_input": "red circle"}),
    ]
    alone = [post(server, slug, **given).json()["results"] for slug, given in kinds]
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda kind: post(server, kind[0], **kind[1]).json()["results"], kinds * 4))
    assert found == alone * 4


def test_in_process_too(model: Florence2) -> None:
    fal.configure(model)
    try:
        given = {**arguments(tasks.OPEN_VOCABULARY_DETECTION), "classes": CLASSES}
        del given["text_input"]
        found = fal.run(f"{APP}/open-vocabulary-detection", given)
        assert [box["label"] for box in found["results"]["bboxes"]] == [
            box.label for box in model.detect(SAMPLE, CLASSES).bboxes
        ]
    finally:
        fal.configure()
