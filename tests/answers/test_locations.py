"""Bins, location tokens and regions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from florence_onnx.answers.locations import (
    Region,
    check_size,
    dequantize,
    from_tokens,
    quantize,
    to_boxes,
    to_points,
    to_tokens,
)
from florence_onnx.errors import InputError, RegionError
from tests.shared_data import rows

sizes = st.tuples(st.integers(1, 8192), st.integers(1, 8192))
bins = st.integers(0, 999)


def test_recorded_boxes_quantize_and_dequantize_as_in_the_reference() -> None:
    for row in rows("quantize_cases.jsonl"):
        size = tuple(row["image_size"])
        assert quantize(row["box"], size).tolist() == row["bins"], row
        assert to_tokens(row["bins"]) == row["region"]
        assert dequantize(row["bins"], size).tolist() == row["dequantized_ms"], row
        assert np.trunc(dequantize(row["bins"], size)).tolist() == row["dequantized_native"], row


def test_recorded_boxes_become_regions() -> None:
    for row in rows("quantize_cases.jsonl"):
        x1, y1, x2, y2 = row["box"]
        size = tuple(row["image_size"])
        if x1 > x2 or y1 > y2:
            with pytest.raises(RegionError, match="must be left of and above"):
                Region.from_pixels(*row["box"], size)
        else:
            assert Region.from_pixels(*row["box"], size).location_tokens == row["region"]


def test_float32_arithmetic_equals_torch_for_every_bin() -> None:
    torch = pytest.importorskip("torch", reason="compares with torch's float32 arithmetic")
    numbers = torch.arange(1000)
    for width in [*range(1, 8193, 97), 640, 1040, 8192]:
        expected = (numbers + 0.5) * (width / 1000)
        assert np.array_equal(dequantize(np.stack([np.arange(1000)] * 2, -1), (width, width))[:, 0], expected.numpy())


@given(st.lists(st.floats(-100, 9000, width=32), min_size=1, max_size=20), sizes)
def test_quantize_equals_torch(values: list[float], size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch", reason="compares with torch's float32 arithmetic")
    pixels = np.array([[value, value] for value in values], dtype=np.float32)
    for axis in (0, 1):
        expected = (torch.from_numpy(pixels[:, axis]) / (size[axis] / 1000)).floor().clamp(0, 999).int()
        assert quantize(pixels, size)[:, axis].tolist() == expected.tolist()


@given(bins, bins, sizes)
def test_the_middle_of_a_bin_lies_in_that_bin(x: int, y: int, size: tuple[int, int]) -> None:
    assert quantize(dequantize([x, y], size), size).tolist() == [x, y]


def test_truncation_needs_float32() -> None:
    # 1040 / 1000 is not exact: float64 ends just below an integer where float32 reaches it
    in_float64 = np.trunc((np.arange(1000) + 0.5) * 1.04)
    in_float32 = np.trunc(dequantize(np.stack([np.arange(1000)] * 2, -1), (1040, 1040))[:, 0])
    assert (in_float64 != in_float32).any()


def test_quantize_clips_to_the_outermost_bins() -> None:
    assert quantize([-5, 1e300, -math.inf, math.inf], (640, 480)).tolist() == [0, 999, 0, 999]
    assert quantize([[640, 480]], (640, 480)).tolist() == [[999, 999]]


def test_quantize_rejects_nan_and_unpaired_coordinates() -> None:
    with pytest.raises(RegionError, match="NaN"):
        quantize([1.0, math.nan], (640, 480))
    with pytest.raises(RegionError, match="pairs"):
        quantize([1.0, 2.0, 3.0], (640, 480))


@pytest.mark.parametrize(
    "size", [(0, 480), (640, -1), (640,), (640, 480, 3), 640, (640.5, 480), (True, 480), None, "ab"]
)
def test_malformed_sizes_are_rejected(size: object) -> None:
    with pytest.raises(InputError, match=r"\(width, height\)"):
        check_size(size)  # type: ignore[arg-type]


def test_numpy_sizes_are_accepted() -> None:
    width, height = check_size((np.int64(640), np.int32(480)))  # type: ignore[arg-type]
    assert (width, height) == (640, 480)
    assert type(width) is int


@given(st.lists(bins))
def test_tokens_round_trip(numbers: list[int]) -> None:
    assert from_tokens(to_tokens(numbers)) == numbers


def test_tokens_of_any_length_are_read() -> None:
    assert from_tokens("<loc_007>x<loc_1000><loc_><loc_-1><LOC_3>") == [7, 1000]
    assert from_tokens(f"<loc_{'9' * 10_000}><loc_{'0' * 10_000}1>") == [10**18, 1]
    assert np.isfinite(dequantize([10**18, 10**18], (8192, 8192))).all()


def test_incomplete_boxes_and_points_are_dropped() -> None:
    assert to_boxes([0, 1, 2, 3, 4, 5, 6], (1000, 1000)) == [(0.5, 1.5, 2.5, 3.5)]
    assert to_boxes([1, 2, 3], (10, 10)) == []
    points = to_points([0, 1, 2, 3, 4], (1000, 2000))
    assert [(point.x, point.y) for point in points] == [(0.5, 3.0), (2.5, 7.0)]
    assert to_points([1], (10, 10)) == ()


def test_coordinates_are_plain_floats_of_float32_value() -> None:
    ((x1, *_),) = to_boxes([52, 332, 932, 774], (640, 480))
    assert type(x1) is float
    assert x1 == 33.599998474121094 == float(np.float32(x1))


@given(st.tuples(bins, bins), st.tuples(bins, bins))
def test_every_ordered_pair_of_corners_is_a_region(horizontal: tuple[int, int], vertical: tuple[int, int]) -> None:
    (x1, x2), (y1, y2) = sorted(horizontal), sorted(vertical)
    region = Region(x1, y1, x2, y2)
    assert region.location_tokens == f"<loc_{x1}><loc_{y1}><loc_{x2}><loc_{y2}>"
    assert from_tokens(region.location_tokens) == [region.x1, region.y1, region.x2, region.y2]


def test_region_converts_numpy_integers() -> None:
    region = Region(*np.array([1, 2, 3, 4], dtype=np.uint16))  # type: ignore[arg-type]
    assert region == Region(1, 2, 3, 4)
    assert type(region.x1) is int


@pytest.mark.parametrize(
    ("corners", "message"),
    [
        ((-1, 0, 1, 1), "x1 = -1 is out of range: bins go from 0 to 999"),
        ((0, 0, 0, 1000), "y2 = 1000 is out of range"),
        ((0, 0, 640, 1e3), "y2 must be an integer"),
        ((0, 0, 1.0, 1), "x2 must be an integer location bin from 0 to 999, got 1.0"),
        ((True, 0, 1, 1), "x1 must be an integer"),
        (("1", 0, 1, 1), "x1 must be an integer"),
        ((None, 0, 1, 1), "x1 must be an integer"),
        ((5, 0, 4, 1), "must be left of and above"),
        ((0, 5, 4, 1), "must be left of and above"),
    ],
)
def test_wrong_regions_are_rejected(corners: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(RegionError, match=message):
        Region(*corners)


def test_region_errors_are_value_errors_that_point_to_pixels() -> None:
    with pytest.raises(ValueError, match=r"Region\.from_pixels\(x1, y1, x2, y2, size\)"):
        Region(0, 0, 1200, 900)


def test_region_from_pixels_clips_to_the_image() -> None:
    assert Region.from_pixels(-10, -10, 10_000, 10_000, (640, 480)) == Region(0, 0, 999, 999)
    assert Region.from_pixels(320, 240, 480, 479.9, (640, 480)) == Region(500, 500, 750, 999)
    assert Region.from_pixels(np.float32(320), np.int64(240), 320, 240, (640, 480)) == Region(500, 500, 500, 500)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((math.nan, 0, 1, 1), "x1 must be a number of pixels, got NaN"),
        ((0, 0, 1, "a"), "y2 must be a number of pixels"),
        ((9, 0, 1, 1), "must be left of and above"),
        ((700, 10, 800, 20), "outside the image of 640 x 480"),
        ((10, -20, 20, -1), "outside the image"),
    ],
)
def test_wrong_pixel_boxes_are_rejected(box: tuple[float, float, float, float], message: str) -> None:
    with pytest.raises(RegionError, match=message):
        Region.from_pixels(*box, (640, 480))
