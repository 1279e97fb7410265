"""Annotated images: what is drawn where and in which colours, and that any result can be drawn."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from florence_onnx.answers.draw import colour_of, draw
from florence_onnx.answers.results import (
    BoundingBox,
    BoundingBoxes,
    OCRBoundingBox,
    OCRBoundingBoxSingle,
    Point,
    Polygon,
    PolygonOutput,
)
from florence_onnx.errors import ImageNotFoundError, InputError
from florence_onnx.tasks import parse

SIZE = (320, 240)


def _canvas(colour: int = 128) -> Image.Image:
    return Image.new("RGB", SIZE, (colour, colour, colour))


def _changed(image: Image.Image) -> npt.NDArray[np.bool_]:
    """(H,W), True where the image is no longer grey 128."""
    return (np.asarray(image) != 128).any(axis=-1)


def _box(x: float, y: float, w: float, h: float, label: str = "car") -> BoundingBoxes:
    return BoundingBoxes((BoundingBox(x, y, w, h, label),))


def test_the_input_image_is_not_changed() -> None:
    canvas = _canvas()
    drawn = draw(canvas, _box(20, 60, 100, 80))
    assert not _changed(canvas).any() and _changed(drawn).any()
    assert drawn.mode == "RGB" and drawn.size == canvas.size


def test_a_box_is_an_outline_in_the_colour_of_its_label() -> None:
    drawn = draw(_canvas(), _box(100, 60, 100, 80))
    assert drawn.getpixel((150, 60)) == drawn.getpixel((100, 100)) == colour_of("car")
    assert drawn.getpixel((150, 139)) == drawn.getpixel((199, 100)) == colour_of("car")
    assert drawn.getpixel((150, 100)) == (128, 128, 128)


def test_the_tag_stands_above_the_box() -> None:
    changed = _changed(draw(_canvas(), _box(100, 60, 100, 80)))
    rows, columns = np.nonzero(changed[:60])
    assert rows.min() > 35 and columns.min() == 100 and columns.max() < 160


@pytest.mark.parametrize(
    "box", [(0, 0, 40, 40), (290, 0, 30, 30), (0, 200, 40, 40), (250, 200, 70, 40), (0, 0, 320, 240)]
)
def test_tags_stay_inside_the_image(box: tuple[float, float, float, float]) -> None:
    label = "a long label"
    away = _changed(draw(_canvas(), _box(100, 100, 40, 40, label))).sum() - _changed(_outline(100, 100, 40, 40)).sum()
    with_tag = draw(_canvas(), _box(*box, label))
    tag = (np.asarray(with_tag) != np.asarray(_outline(*box, label))).any(axis=-1).sum()
    assert tag > 0.7 * away


def _outline(x: float, y: float, w: float, h: float, label: str = "a long label") -> Image.Image:
    """The box with a tag of the smallest size."""
    return draw(_canvas(), _box(x, y, w, h, label), font_size=1)


def test_tags_do_not_cover_each_other_where_there_is_room() -> None:
    boxes = tuple(BoundingBox(100, 100, 80, 60, label) for label in ("one", "two", "three", "four"))
    drawn = np.asarray(draw(_canvas(), BoundingBoxes(boxes)))
    for box in boxes:
        assert (drawn == colour_of(box.label)).all(axis=-1).sum() > 150, box.label


def test_colours_are_stable_in_every_process() -> None:
    command = "from florence_onnx.answers.draw import colour_of; print(colour_of('car'), colour_of('中文'))"
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", command],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == f"{colour_of('car')} {colour_of('中文')}"


def test_different_labels_mostly_have_different_colours() -> None:
    labels = [
        "person",
        "car",
        "dog",
        "cat",
        "tree",
        "house",
        "chair",
        "table",
        "cup",
        "bottle",
        "book",
        "bus",
        "wheel",
        "door",
        "window",
    ]
    assert len({colour_of(label) for label in labels}) > 10


def test_shapes_without_labels_have_no_tags_and_colours_of_their_own() -> None:
    boxes = BoundingBoxes(tuple(BoundingBox(20.0 + 60 * i, 60.0, 40.0, 40.0, "") for i in range(4)))
    drawn = draw(_canvas(), boxes)
    assert not _changed(drawn)[:60].any()
    assert len({drawn.getpixel((40 + 60 * i, 60)) for i in range(4)}) == 4


def test_polygons_are_filled_translucently() -> None:
    points = tuple(Point(x, y) for x, y in ((100, 50), (220, 50), (160, 200)))
    drawn = draw(_canvas(), PolygonOutput((Polygon(points, ""),)))
    inside, edge = drawn.getpixel((160, 100)), drawn.getpixel((160, 50))
    assert inside not in ((128, 128, 128), edge)
    assert drawn.getpixel((90, 190)) == (128, 128, 128)
    assert len(set(map(tuple, np.asarray(drawn).reshape(-1, 3)))) > 10  # smooth edges


def test_quads_are_drawn_by_their_corners() -> None:
    quad = tuple(Point(x, y) for x, y in ((160, 60), (260, 120), (160, 180), (60, 120)))
    drawn = draw(_canvas(), OCRBoundingBox((OCRBoundingBoxSingle(60, 60, 200, 120, "", quad=quad),)))
    assert _changed(drawn)[120, 58:64].any() and not _changed(drawn)[60, 60:140].any()


def test_a_quad_without_corners_is_drawn_as_its_box() -> None:
    drawn = draw(_canvas(), OCRBoundingBox((OCRBoundingBoxSingle(60, 60, 200, 120, "STOP"),)))
    assert drawn.getpixel((160, 60)) == colour_of("STOP")


def test_open_vocabulary_polygons_are_drawn() -> None:
    text = "roof<poly><loc_100><loc_300><loc_900><loc_300><loc_500><loc_900></poly>"
    drawn = draw(_canvas(), parse("<OPEN_VOCABULARY_DETECTION>", text, SIZE))
    assert _changed(drawn).mean() > 0.1


def test_line_width_and_font_size_grow_with_the_image() -> None:
    small = draw(Image.new("RGB", (600, 500)), _box(100, 100, 200, 160))
    large = draw(Image.new("RGB", (2400, 2000)), _box(400, 400, 800, 640))
    share = [(np.asarray(image) != 0).any(axis=-1).mean() for image in (small, large)]
    assert share[1] / share[0] == pytest.approx(1, abs=0.2)


def test_widths_and_sizes_can_be_set() -> None:
    thin = _changed(draw(_canvas(), _box(50, 50, 100, 80), line_width=1, font_size=8)).sum()
    thick = _changed(draw(_canvas(), _box(50, 50, 100, 80), line_width=9, font_size=30)).sum()
    assert thick > 4 * thin


def test_a_font_can_be_given(tmp_path: Path) -> None:
    default = ImageFont.load_default(20)
    assert isinstance(default, ImageFont.FreeTypeFont)
    path = tmp_path / "letters.ttf"
    path.write_bytes(default.path.getvalue())  # type: ignore[attr-defined, union-attr]
    with_font = draw(_canvas(), _box(50, 50, 100, 80), font=path)
    default_font = draw(_canvas(), _box(50, 50, 100, 80))
    assert _changed(with_font).sum() == pytest.approx(_changed(default_font).sum(), rel=0.1)
    with pytest.raises(ImageNotFoundError, match=r"cannot open the font no\.ttf"):
        draw(_canvas(), _box(50, 50, 100, 80), font="no.ttf")


@pytest.mark.parametrize("nothing", ["a caption", None, (), 7])
def test_results_without_geometry_are_refused(nothing: object) -> None:
    with pytest.raises(InputError, match="has nothing to draw"):
        draw(_canvas(), nothing)


def test_empty_answers_leave_the_image_as_it_is() -> None:
    for empty in (BoundingBoxes(()), OCRBoundingBox(()), PolygonOutput(()), PolygonOutput((Polygon((), ""),))):
        assert not _changed(draw(_canvas(), empty)).any()


def test_shapes_outside_the_image_do_not_show() -> None:
    outside = BoundingBoxes((BoundingBox(900, 900, 50, 50, ""), BoundingBox(-90, 20, 50, 50, "")))
    assert not _changed(draw(_canvas(), outside)).any()
    far = Polygon((Point(1e15, 1e15), Point(2e15, 1e15), Point(1e15, 2e15)), "")
    assert not _changed(draw(_canvas(), PolygonOutput((far,)))).any()


_coordinates = st.one_of(st.floats(-50, 400), st.floats(-1e18, 1e18))
_labels = st.one_of(
    st.text(max_size=20), st.sampled_from(["", "\n", "中文", "é" * 200, "word " * 100, "\x00", "\ud800"])
)


@given(
    st.lists(st.lists(st.builds(Point, _coordinates, _coordinates), max_size=6).map(tuple), max_size=4),
    st.lists(st.builds(BoundingBox, _coordinates, _coordinates, _coordinates, _coordinates, _labels), max_size=4),
    _labels,
    st.tuples(st.integers(1, 80), st.integers(1, 80)),
)
@settings(max_examples=80, deadline=None)
def test_any_result_can_be_drawn(
    outlines: list[tuple[Point, ...]], boxes: list[BoundingBox], label: str, size: tuple[int, int]
) -> None:
    polygons = tuple(Polygon(points, label) for points in outlines)
    assert draw(Image.new("L", size), BoundingBoxes(tuple(boxes), polygons)).size == size
