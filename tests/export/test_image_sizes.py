"""Bundles with a vision encoder for each of several image sizes: what is written, and that each size is verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from florence_onnx import BundleFormatError, CheckpointError, InputError
from florence_onnx.bundles import bundle as bundles
from florence_onnx.bundles.description import sealed
from tests import descriptions
from tests.command_line import run_here
from tests.conftest import NO_TORCH, Exported
from tests.exported_bundles import SIZES

torch = pytest.importorskip("torch", reason=NO_TORCH)
onnx = pytest.importorskip("onnx", reason=NO_TORCH)
from export.__main__ import main  # noqa: E402
from export.bundles.writer import export_bundle  # noqa: E402
from export.transformers_js.writer import export_transformers_js  # noqa: E402

NAMES = ("vision_encoder.onnx", "vision_encoder_64x64.onnx", "vision_encoder_160x96.onnx")


def description(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / bundles.DESCRIPTION).read_text())
    return found


def test_the_description_names_the_sizes(sized: Exported) -> None:
    found = description(sized.bundle)["image_sizes"]
    assert [(tuple(each["image_size"]), each["num_image_tokens"], each["graph"]) for each in found] == [
        (size, count, name) for size, count, name in zip(SIZES, (17, 5, 16), NAMES, strict=True)
    ]
    read = bundles.read(sized.bundle)
    assert read.sizes.image_size == SIZES[0] and read.image_sizes == SIZES
    small = read.resized(64)
    assert (small.sizes.image_size, small.sizes.num_image_tokens) == ((64, 64), 5)
    assert small.graphs[bundles.VISION_ENCODER].name == NAMES[1]
    assert small.memory["picture"] < read.memory["picture"], "smaller images have smaller activations"
    assert small.resized(SIZES[0]).sizes == read.sizes


def test_every_size_is_verified(sized: Exported) -> None:
    verified = description(sized.bundle)["verification"]
    assert {*NAMES} < set(verified["graphs"])
    assert all(0 < error["max_rel"] < 1e-4 for error in verified["graphs"].values())
    searches = {f"{search}{size}" for search in ("greedy", "beam-3") for size in ("", ", 64x64", ", 160x96")}
    assert set(verified["tokens"]) == searches
    assert all(tokens["equal"] == tokens["total"] > 0 for tokens in verified["tokens"].values())


def test_vision_encoders_share_all_weights(sized: Exported, tiny: Exported) -> None:
    places = []
    for name in NAMES:
        graph = onnx.load(str(sized.bundle / name), load_external_data=False).graph
        stored = [
            {item.key: item.value for item in tensor.external_data}
            for tensor in graph.initializer
            if tensor.data_location == onnx.TensorProto.EXTERNAL
        ]
        places.append({(entry["location"], entry["offset"], entry["length"]) for entry in stored})
    assert places[0] == places[1] == places[2] and len(places[0]) > 20
    weights = [(each.bundle / bundles.WEIGHTS).stat().st_size for each in (sized, tiny)]
    assert weights[0] <= weights[1]


def test_a_bundle_of_one_size_says_nothing_of_sizes(tiny: Exported) -> None:
    """Such bundles are what they were before there were several sizes."""
    assert "image_sizes" not in description(tiny.bundle)
    read = bundles.read(tiny.bundle)
    assert read.image_sizes == ((128, 128),) and read.resized(128) is read
    with pytest.raises(InputError, match=r"reads images of 128x128 pixels, not 64x64.*--image-size 64x64"):
        read.resized(64)


FIRST = {"image_size": [128, 128], "num_image_tokens": 17, "graph": NAMES[0]}
SMALL = {"image_size": [64, 64], "num_image_tokens": 5, "graph": NAMES[1]}


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([FIRST, {**SMALL, "num_image_tokens": 0}], "num_image_tokens must be a whole number from 1 to"),
        ([FIRST, {**SMALL, "num_image_tokens": "5"}], "num_image_tokens must be a whole number from 1 to"),
        ([FIRST, {**SMALL, "num_image_tokens": 1024}], "num_image_tokens must be below max_positions"),
        ([FIRST, {**SMALL, "image_size": [64]}], "image_size must be 2 whole numbers from 1 to"),
        ([FIRST, {**SMALL, "image_size": [64, 64.0]}], "image_size must be 2 whole numbers from 1 to"),
        ([FIRST, {**SMALL, "image_size": [64, 2**40]}], "image_size must be 2 whole numbers from 1 to"),
        ([FIRST, {"num_image_tokens": 5, "graph": NAMES[1]}], "image_size must be 2 whole numbers from 1 to"),
        ([FIRST, {**SMALL, "graph": f"../{NAMES[1]}"}], "graph must be the name of a file in the bundle"),
        ([FIRST, {**SMALL, "graph": None}], "graph must be the name of a file in the bundle"),
        ([FIRST, {**SMALL, "graph": "decoder.onnx"}], "'decoder.onnx' cannot be the name of a vision encoder"),
        ([FIRST, {**SMALL, "memory": {"weights": {}}}], "memory.text_encoder must be pairs"),
        ([FIRST, 64], "image_sizes must be an object, got 64"),
        ([FIRST, SMALL, SMALL], "image_sizes has a size twice"),
        ([SMALL, FIRST], "image_sizes must begin with 128x128, 17 image tokens"),
        ([], "image_sizes must begin with"),
        ({}, "image_sizes must be a list"),
    ],
)
def test_damaged_sizes_are_refused(sized: Exported, tmp_path: Path, entries: Any, reason: str) -> None:
    for path in sized.bundle.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / bundles.DESCRIPTION).unlink()
    descriptions.write(tmp_path, sealed({**descriptions.read(sized.bundle), "image_sizes": entries}))
    with pytest.raises(BundleFormatError, match=f"incomplete or damaged .*{reason}"):
        bundles.read(tmp_path)


def test_the_command_line_takes_sizes(tiny: Exported, tmp_path: Path) -> None:
    source = tiny.bundle.parent / "checkpoint"
    done = run_here(main, source, tmp_path / "out", "--image-size", "64", "--image-size", "96x64")
    assert done.returncode == 0, done.stderr
    read = bundles.read(tmp_path / "out")
    assert read.image_sizes == ((64, 64), (96, 64))
    assert read.sizes.num_image_tokens == 5 and read.resized((96, 64)).sizes.num_image_tokens == 7
    wrong = run_here(main, source, tmp_path / "wrong", "--image-size", "big")
    assert wrong.returncode == 1 and "WIDTHxHEIGHT, such as 384 or 512x384; got 'big'" in wrong.stderr
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((1632, 64), "images of 1632 pixels give 51 cells a side; the checkpoint has positions for 1 to 50"),
        ((1024, 1024), "give 1025 image tokens; of the text encoder's 1024 positions they leave 0 for a prompt"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tiny: Exported, size: tuple[int, int], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        tiny.checkpoint.resized([(64, 64), size])


def test_transformers_js_has_one_square(tiny: Exported, tmp_path: Path) -> None:
    for sizes in (SIZES, [(160, 96)]):
        with pytest.raises(CheckpointError, match="one image size, a square"):
            export_transformers_js(tiny.checkpoint.resized(sizes), tmp_path / "out")


def test_a_single_other_size_is_an_ordinary_bundle(tiny: Exported, tmp_path: Path) -> None:
    written = export_bundle(tiny.checkpoint.resized([(64, 64)]), tmp_path / "out")
    assert written.sizes.image_size == (64, 64) and not written.encoders
    assert all(tokens["equal"] == tokens["total"] for tokens in written.verification["tokens"].values())


@torch.inference_mode()
@pytest.mark.parametrize("size", [(1, 1), (16, 16), (100, 100), (64, 512), (352, 352)])
def test_the_graph_is_what_transformers_computes_at_any_size(tiny: Exported, size: tuple[int, int]) -> None:
    """Sizes need not be multiples of 32, nor square: a side of s pixels gives ⌈s / 32⌉ cells."""
    from export.checkpoints.preprocessing import count_image_tokens
    from export.graphs.vision_encoder import VisionEncoder

    width, height = size
    pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    expected = tiny.checkpoint.model.get_image_features(pixels)
    assert expected.shape[1] == count_image_tokens(tiny.checkpoint.config, size)
    assert expected.shape[1] == -(-width // 32) * -(-height // 32) + 1
    for is_shared in (False, True):
        found = VisionEncoder(tiny.checkpoint.model, size, is_shared=is_shared).eval()(pixels)
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
