"""Tiles of large images: nothing on a seam is lost, and nothing occurs twice."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from florence_onnx import (
    BoundingBox,
    BoundingBoxes,
    Florence2,
    GenerationOptions,
    InputError,
    OCRBoundingBox,
    OCRBoundingBoxSingle,
    Point,
    Polygon,
    PolygonOutput,
    Prediction,
    Region,
    Tiles,
    tasks,
)
from florence_onnx.answers.matching import box_iou
from florence_onnx.bundles import bundle
from florence_onnx.tasks import Task
from florence_onnx.tiling import asking, merging
from florence_onnx.tiling.pieces import Box, pieces_of

SAMPLES = sorted((bundle.DEMO_DIRECTORY.parent / "samples").glob("*.png"))
GREEDY = GenerationOptions(num_beams=1)
SIZE = (1500, 1100)
Things = Sequence[tuple[str, Box]]


# ------------------------------------------------------------------------------------------------------- the layout


@given(st.integers(1, 1400), st.integers(1, 1400), st.integers(200, 1000), st.floats(0, 0.75))
def test_tiles_cover_the_image_and_overlap(width: int, height: int, size: int, overlap: float) -> None:
    tiles = Tiles(size, overlap)
    boxes = tiles.boxes((width, height))
    assert len(boxes) == 1 or not tiles.fits((width, height))
    for axis, length in ((0, width), (1, height)):
        spans = sorted({(box[axis], box[axis + 2]) for box in boxes})
        assert spans[0][0] == 0 and spans[-1][1] == length
        assert {end - start for start, end in spans} == {min(size, length)}
        for (_, end), (start, _) in pairwise(spans):
            assert end - start >= tiles.shared - 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": 31},
        {"size": 768.0},
        {"size": True},
        {"overlap": -0.1},
        {"overlap": 0.8},
        {"overlap": "much"},
        {"overlap": float("nan")},
        {"whole": 1},
    ],
)
def test_wrong_tiles(arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Tiles(**arguments)


def test_too_many_tiles() -> None:
    with pytest.raises(InputError, match="use larger tiles"):
        Tiles(32).boxes((5000, 5000))


# ---------------------------------------------------------------------------- a model that sees what a tile shows


@cache
def atlas() -> Image.Image:
    """An image whose pixels say where they are."""
    xs, ys = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    return Image.fromarray(np.stack([xs % 256, ys % 256, xs // 256 * 16 + ys // 256], axis=-1).astype(np.uint8))


def corner(crop: Image.Image) -> tuple[int, int]:
    """Where a crop of the atlas begins."""
    x, y, high = crop.getpixel((0, 0))  # type: ignore[misc]
    return x + high // 16 * 256, y + high % 16 * 256


class Oracle:
    """Answers about a crop with all things in it, cut off at its edges, the smaller the part the lower the score."""

    def __init__(self, things: Things, make: Callable[[list[tuple[str, Box, float]]], Any]) -> None:
        self._things = things
        self._make = make
        self.options: list[GenerationOptions] = []

    def run_batch(self, task: Any, crops: Any, *, options: Any, **_: Any) -> list[Prediction[Any]]:
        self.options.append(options)
        return [Prediction(self._answer(crop), task, "…", (2, 0, 2), False, crop) for crop in crops]

    def _answer(self, crop: Image.Image) -> Any:
        left, top = corner(crop)
        seen = []
        for label, (x0, y0, x1, y1) in self._things:
            box = (max(x0 - left, 0), max(y0 - top, 0), min(x1 - left, crop.width), min(y1 - top, crop.height))
            if box[2] - box[0] > 4 and box[3] - box[1] > 4:
                share = (box[2] - box[0]) / (x1 - x0) * (box[3] - box[1]) / (y1 - y0)
                seen.append((label, box, 0.5 + share / 4))
        return self._make(seen)


def boxes(seen: list[tuple[str, Box, float]]) -> BoundingBoxes:
    return BoundingBoxes(
        tuple(BoundingBox(b[0], b[1], b[2] - b[0], b[3] - b[1], label, score=score) for label, b, score in seen)
    )


def outlines(seen: list[tuple[str, Box, float]]) -> PolygonOutput:
    return PolygonOutput(
        tuple(Polygon(_corners(b), "", number, score=score) for number, (_, b, score) in enumerate(seen))
    )


def quads(seen: list[tuple[str, Box, float]]) -> OCRBoundingBox:
    return OCRBoundingBox(
        tuple(
            OCRBoundingBoxSingle(b[0], b[1], b[2] - b[0], b[3] - b[1], label, _corners(b), score)
            for label, b, score in seen
        )
    )


def _corners(b: Box) -> tuple[Point, ...]:
    return Point(b[0], b[1]), Point(b[2], b[1]), Point(b[2], b[3]), Point(b[0], b[3])


@st.composite
def scattered(draw: st.DrawFn) -> list[tuple[str, Box]]:
    """Things in cells of 250 pixels, most of them small; few labels, so that neighbours often share one."""
    rng = random.Random(draw(st.integers(0, 10**6)))
    cells = [(x, y) for x in range(SIZE[0] // 250) for y in range(SIZE[1] // 250)]
    things = []
    for x, y in rng.sample(cells, draw(st.integers(1, 12))):
        width, height = rng.uniform(20, 240), rng.uniform(20, 240)
        x0, y0 = x * 250 + rng.uniform(0, 245 - width), y * 250 + rng.uniform(0, 245 - height)
        things.append((rng.choice("ab"), (x0, y0, x0 + width, y0 + height)))
    return things


@settings(deadline=None, max_examples=30)
@given(scattered(), st.sampled_from([Tiles(400, 0.15), Tiles(500, 0.6, whole=False), Tiles(300, 0.3)]))
def test_every_thing_is_found_once_and_whole(things: list[tuple[str, Box]], tiles: Tiles) -> None:
    """Also those that are larger than the overlap and cut in every tile: their halves are joined."""
    found = asking.run(Oracle(things, boxes), tasks.OBJECT_DETECTION, atlas(), tiles).results.bboxes
    rounded = sorted((b.label, *(round(v) for v in (b.x, b.y, b.x + b.w, b.y + b.h))) for b in found)
    assert rounded == sorted((label, *map(round, box)) for label, box in things)


def test_outlines_of_one_object_stay_together_across_a_seam() -> None:
    things = [("", (100.0, 100.0, 380.0, 160.0)), ("", (700.0, 700.0, 760.0, 760.0))]
    tiles = Tiles(300, 0.1, whole=False)
    found = asking.run(
        Oracle(things, outlines), tasks.REFERRING_EXPRESSION_SEGMENTATION, atlas(), tiles, "x"
    ).results.polygons
    spans: dict[int, list[float]] = {}
    for part in found:
        spans.setdefault(part.instance, []).extend(point.x for point in part.points)
    assert sorted((round(min(xs)), round(max(xs))) for xs in spans.values()) == [(100, 380), (700, 760)]
    assert len(found) == 3, "two outlines of the first object, one of the second"


def test_the_whole_image_gives_what_no_tile_shows_completely() -> None:
    things = [("big", (50.0, 50.0, 1400.0, 1000.0)), ("small", (600.0, 500.0, 650.0, 550.0))]
    found = asking.run(Oracle(things, boxes), tasks.OBJECT_DETECTION, atlas(), Tiles(400, 0.2)).results.bboxes
    assert sorted((box.label, round(box.w)) for box in found) == [("big", 1350), ("small", 50)]


def test_small_things_that_only_the_whole_image_shows_are_not_believed() -> None:
    tiles = Tiles(400, 0.2)
    small, large = ((label, (10.0, 10.0, 10.0 + side, 40.0), 0.9) for label, side in (("s", 60), ("l", 200)))
    pieces = pieces_of(boxes([small, large]), (0, 0, *SIZE), SIZE, is_whole=True)
    assert [piece.label for piece in merging.merge(pieces, tiles, SIZE)] == ["l"]


def test_two_tiles_that_name_a_thing_differently_give_one_answer() -> None:
    first, second = (pieces_of(boxes([each]), (0, 0, 400, 400), SIZE) for each in _named(("red", 0.6), ("pink", 0.8)))
    moved = pieces_of(boxes(_named(("pink", 0.8))), (200, 0, 600, 400), SIZE)
    same_tile = merging.suppress([*first, *second])
    assert [piece.label for piece in same_tile] == ["pink", "red"], "one tile means both names"
    shifted = [*first, *moved]
    assert len(merging.suppress(shifted)) == 2, "another place"
    other = pieces_of(boxes([("pink", (50.0, 100.0, 150.0, 200.0), 0.8)]), (200, 0, 600, 400), SIZE)
    assert [piece.label for piece in merging.suppress([*first, *other])] == ["pink"]


def _named(*names: tuple[str, float]) -> list[tuple[str, Box, float]]:
    return [(name, (250.0, 100.0, 350.0, 200.0), score) for name, score in names]


# ----------------------------------------------------------------------------------------------------------- text


def line(text: str, left: float, right: float, top: float, tile: tuple[int, int, int, int]) -> Any:
    """A line of text at a place in the image, as a tile's answer has it."""
    box = (left - tile[0], top - tile[1], right - tile[0], top + 30 - tile[1])
    return pieces_of(quads([(text, box, 0.9)]), tile, SIZE)[0]


LEFT_TILE, RIGHT_TILE = (0, 0, 400, 400), (340, 0, 740, 400)


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ("THE QUICK BRO", "K BROWN FOX JUMPS", "THE QUICK BROWN FOX JUMPS"),
        ("HELLO", "WORLD", "HELLOWORLD"),
        ("ANNA", "ANNA", "ANNANNA"),
    ],
)
def test_a_line_of_text_is_joined_across_a_seam(left: str, right: str, expected: str) -> None:
    pieces = [line(left, 60, 400, 50, LEFT_TILE), line(right, 340, 700, 52, RIGHT_TILE)]
    (joined,) = merging.merge(pieces, Tiles(400, 0.15), SIZE)
    quad = joined.items[0]
    assert quad.label == expected
    assert (quad.x, quad.x + quad.w) == (60, 700)
    assert [round(point.x) for point in quad.quad] == [60, 700, 700, 60]


def test_lines_that_are_not_cut_or_not_in_a_row_are_not_joined() -> None:
    pieces = [
        line("ONE", 60, 400, 50, LEFT_TILE),
        line("TWO", 340, 700, 95, RIGHT_TILE),
        line("THREE", 60, 300, 200, LEFT_TILE),
    ]
    found = merging.merge(pieces, Tiles(400, 0.15), SIZE)
    assert sorted(piece.label for piece in found) == ["ONE", "THREE", "TWO"]


def test_half_a_word_gives_way_to_the_word() -> None:
    pieces = [line("STO", 350, 400, 50, LEFT_TILE), line("STOP", 352, 430, 50, RIGHT_TILE)]
    assert [piece.label for piece in merging.merge(pieces, Tiles(400, 0.15), SIZE)] == ["STOP"]


def test_text_comes_in_reading_order() -> None:
    """Words stand a little higher and lower in each row; each is cut by some seam or other."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    rng = random.Random(5)
    things = []
    for number, word in enumerate(words):
        x, y = 100 + number % 3 * 450, 200 + number // 3 * 300 + rng.uniform(-12, 12)
        things.append((word, (x, y, x + 60, y + 40)))
    rng.shuffle(things)
    oracle = Oracle(things, quads)
    tiles = Tiles(500, 0.3)
    found = asking.run(oracle, tasks.OCR_WITH_REGION, atlas(), tiles)
    assert [quad.label for quad in found.results.quad_boxes] == words
    text = asking.run(oracle, tasks.OCR, atlas(), tiles)
    assert text.results == "\n".join(words) and text.task is tasks.OCR
    assert all(tile.prediction.task is tasks.OCR_WITH_REGION for tile in text.tiles)  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------ the model


@pytest.fixture(scope="module", params=[0, 4], ids=["host", "continuous batching"])
def model(request: pytest.FixtureRequest) -> Florence2:
    options = {"intra_op_num_threads": 1}
    return Florence2.from_pretrained("demo", device="cpu", session_options=options, max_batch=request.param)


@pytest.mark.parametrize("task", [each for each in tasks.TASKS.values() if each.needs == "nothing" and each.has_image])
def test_an_image_that_fits_is_answered_as_without_tiles(model: Florence2, task: Task[Any]) -> None:
    image = model.encode(SAMPLES[0])
    assert model.run(task, image, tiles=Tiles(max(image.size))) == model.run(task, image)


def test_recall_on_a_drawn_sheet() -> None:
    """The benchmark's sheets are larger: `benchmarks/results/answers.md`."""
    pytest.importorskip("matplotlib", reason="the drawn words use matplotlib's bundled fonts")
    from export.demo.sheets import make_sheet

    model = Florence2.from_pretrained("demo", device="cpu", session_options={"intra_op_num_threads": 1})
    sheet = make_sheet(random.Random(7), 1250, 8, 8)
    tiles = Tiles(400, 0.5)
    for task, true in ((tasks.OBJECT_DETECTION, sheet.shapes), (tasks.OCR_WITH_REGION, sheet.words)):
        whole, found = (model.run(task, sheet.image, tiles=each, options=GREEDY) for each in (None, tiles))
        counts = [_num_found(each.results, true) for each in (whole, found)]
        assert counts[1] >= max(3 * counts[0], len(true) - 1)
        places = [_box(item) for item in _items(found.results)]
        for _, place in true:
            assert sum(box_iou(place, each) >= 0.5 for each in places) <= 1, "a duplicate"
    assert isinstance(found, asking.TiledPrediction)
    assert [each.box for each in found.tiles] == [*tiles.boxes(sheet.image.size), (0, 0, 1250, 1250)]
    assert found.draw().size == sheet.image.size and found.to_dict()["results"]["quad_boxes"]


def _items(results: Any) -> Any:
    return results.quad_boxes if isinstance(results, OCRBoundingBox) else results.bboxes


def _box(item: Any) -> Box:
    return item.x, item.y, item.x + item.w, item.y + item.h


def _num_found(results: Any, true: Things) -> int:
    found = [(item.label, _box(item)) for item in _items(results)]
    return sum(any(label == name and box_iou(box, place) >= 0.5 for name, place in found) for label, box in true)


def test_tasks_that_cannot_be_merged(model: Florence2) -> None:
    for task, region in ((tasks.CAPTION, None), (tasks.REGION_TO_SEGMENTATION, Region(1, 2, 3, 4))):
        with pytest.raises(InputError):
            model.run(task, SAMPLES[0], region=region, tiles=Tiles(64))
    with pytest.raises(InputError, match="Tiles"):
        model.run(tasks.OBJECT_DETECTION, SAMPLES[0], tiles=768)  # type: ignore[arg-type]
