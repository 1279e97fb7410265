"""Fitting images into the model's input: where they lie, what the margins are, and coordinates there and back."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from florence_onnx import InputError
from florence_onnx.images.placement import Placement, check_fit
from florence_onnx.images.preprocessing import Preparation, preprocess


@pytest.mark.parametrize(
    ("source", "target", "box"),
    [
        ((100, 50), (64, 64), (0, 16, 64, 32)),
        ((50, 100), (64, 64), (16, 0, 32, 64)),
        ((30, 30), (64, 64), (0, 0, 64, 64)),
        ((100, 50), (64, 32), (0, 0, 64, 32)),
        ((5000, 3), (64, 64), (0, 31, 64, 1)),
    ],
)
def test_padding_centres_the_image(
    source: tuple[int, int], target: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    assert Placement(source, target, "pad").box == box
    assert Placement(source, target, "stretch").box == (0, 0, *target)


def test_margins_have_the_mean_colour_and_the_image_is_not_squeezed() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8))
    found = preprocess(image, size=(64, 64), fit="pad")
    inner = preprocess(image, size=(64, 32))
    np.testing.assert_array_equal(found[:, :, 16:48], inner)
    margins = np.concatenate([found[:, :, :16], found[:, :, 48:]], axis=2)
    assert np.abs(margins).max() < 0.01, "the mean colour, which normalises to zero"
    assert np.ptp(margins.reshape(3, -1), axis=1).max() == 0


def test_an_image_of_the_same_aspect_is_the_same_in_both_fits() -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 120, 3), dtype=np.uint8))
    found = [preprocess(image, size=(128, 64), fit=fit) for fit in ("stretch", "pad")]
    np.testing.assert_array_equal(*found)


def test_coordinates_go_there_and_back() -> None:
    placement = Preparation((64, 96), fit="pad").placement(Image.new("RGB", (301, 77)))
    for axis, side in enumerate(placement.source_size):
        for coordinate in (0.0, 1.5, side / 2, float(side)):
            there = placement.to_input(coordinate, axis)
            assert 0 <= there <= placement.image_size[axis]
            assert placement.to_source(there, axis) == pytest.approx(coordinate)
    assert placement.to_source(0.0, 1) == 0.0 and placement.to_source(96.0, 1) == 77.0, "margins are the image's edges"


def test_the_fit_is_one_of_two() -> None:
    with pytest.raises(InputError, match="fit must be 'stretch' or 'pad', got 'crop'"):
        check_fit("crop")
