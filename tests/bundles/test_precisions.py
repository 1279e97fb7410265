"""A precision for each module: how it is written, what it loads, what is downloaded for it, and what errors offer instead."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from florence_onnx import (
    BundleFileMissingError,
    BundleFormatError,
    BundleNotFoundError,
    Florence2,
    GenerationOptions,
    InputError,
    tasks,
)
from florence_onnx.bundles import bundle, precisions
from florence_onnx.bundles.precisions import JS_GRAPHS, js_file
from florence_onnx.commands.main import app
from florence_onnx.images import decoding, preprocessing
from florence_onnx.runtime.engine import OnnxEngine
from florence_onnx.runtime.load_options import LoadOptions
from tests import descriptions
from tests.local_hub import LocalHub

MIXED = {"vision_encoder": "fp16", "decoder": "q4"}
FULL = {"vision_encoder": "fp16", "embed_tokens": "fp32", "encoder_model": "fp32", "decoder_model_merged": "q4"}
SAMPLE = bundle.DEMO_DIRECTORY.parent / "samples" / "scene-1.png"


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "given",
    [
        MIXED,
        "vision_encoder=fp16,decoder=q4",
        " decoder_model_merged = q4 , vision_encoder = fp16",
        {"decoder_model_merged": "q4", "vision_encoder": "fp16"},
        FULL,
        {"vision_encoder": "fp16", "encoder": "fp32", "decoder": "q4"},
        {"vision_encoder": "fp16", "text_encoder": "fp32", "decoder": "q4"},
    ],
)
def test_the_forms_of_one_choice(given: Any) -> None:
    """The names of transformers.js' `dtype`, and short ones."""
    assert precisions.js_modules(given) == FULL
    assert precisions.describe(precisions.js_modules(given)) == ",".join("=".join(pair) for pair in FULL.items())


@pytest.mark.parametrize("name", precisions.JS_SUFFIXES)
def test_a_name_is_the_precision_of_all_modules(name: str) -> None:
    modules = precisions.js_modules(name)
    assert modules == dict.fromkeys(JS_GRAPHS, name)
    assert precisions.describe(modules) == name
    assert precisions.js_modules(precisions.describe(modules)) == modules


def test_the_published_file_names() -> None:
    assert js_file("vision_encoder", "q8") == "onnx/vision_encoder_quantized.onnx"
    assert js_file("embed_tokens", "fp32") == "onnx/embed_tokens.onnx"
    assert js_file("decoder_model_merged", "bnb4") == "onnx/decoder_model_merged_bnb4.onnx"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"vision": "fp16"}, "'vision' with 'fp16'.*vision_encoder, embed_tokens, encoder_model, decoder_model_merged"),
        ({"decoder": 4}, "'decoder' with 4"),
        ({"decoder": "q4", "decoder_model_merged": "q8"}, "decoder_model_merged is given twice"),
        ("decoder=q4,decoder=q8", "given twice"),
        ("decoder=", "'decoder' with ''"),
        ("fp16,decoder=q4", "'fp16' with ''"),
        ({}, "a name such as"),
        (16, "precision cannot be 16"),
        (["fp16"], "precision cannot be"),
    ],
)
def test_what_is_no_precision_is_refused_with_the_forms(given: Any, said: str, published: Path) -> None:
    for folder in (published, bundle.DEMO_DIRECTORY):
        with pytest.raises(InputError, match=said):
            Florence2.from_pretrained(folder, precision=given)


# ------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("precision", ["q8", "uint8", "fp16", "q4", "q4f16", MIXED])
def test_files_of_every_precision_answer(published: Path, photographs: list[Image.Image], precision: Any) -> None:
    model = Florence2.from_pretrained(published, device="cpu", precision=precision)
    vision_precision = precision if isinstance(precision, str) else "fp16"
    sizes = bundle.read(published).sizes
    inputs = {"size": sizes.image_size, "mean": sizes.image_mean, "std": sizes.image_std}
    pixels = preprocessing.preprocess(decoding.load(photographs[0]), **inputs)  # type: ignore[arg-type]
    graph = OnnxEngine(published / js_file("vision_encoder", vision_precision), LoadOptions("cpu"))
    expected = graph.run({"pixel_values": pixels.reshape(1, *pixels.shape[-3:])})["image_features"][0]
    np.testing.assert_array_equal(model.encode(photographs[0]).image_features, expected)
    options = GenerationOptions(max_new_tokens=8, min_new_tokens=6)
    answer = model.run(tasks.OCR, photographs[0], options=options).token_ids
    assert answer[:2] == (2, 0) and len(answer) >= 7
    stated = model.info()
    assert stated["precision"] == precisions.describe(precisions.js_modules(precision))
    assert stated["vision_precision"] == vision_precision


def test_each_module_is_of_its_own_precision(published: Path, photographs: list[Image.Image]) -> None:
    """The mixed model has the features of the fp16 one, and then scores as the fp32 one with the decoder of the q4 one."""
    mixed, half, full, blocks = (
        Florence2.from_pretrained(published, device="cpu", precision=each)
        for each in (MIXED, "fp16", "fp32", {"decoder": "q4"})
    )
    image = photographs[0]
    np.testing.assert_array_equal(mixed.encode(image).image_features, half.encode(image).image_features)
    answer = (2, 0, 5, 6, 7)
    encoded = half.encode(image)
    found = [model.score_tokens(tasks.OCR, encoded, answer) for model in (mixed, blocks, full)]
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 0


def test_a_bundle_that_was_read_has_its_precision(published: Path) -> None:
    read = bundle.read(published, MIXED)
    assert Florence2.from_bundle(read, LoadOptions("cpu", precision="decoder=q4")).info()["layout"] == "transformers.js"
    with pytest.raises(BundleFormatError, match=r"vision_encoder=fp16.*not \{'decoder': 'q8'\}"):
        Florence2.from_bundle(read, LoadOptions("cpu", precision={"decoder": "q8"}))


def described(folder: Path, precision: str, vision_precision: str | None) -> None:
    """The demo bundle, labelled with other precisions."""
    shutil.copytree(bundle.DEMO_DIRECTORY, folder)
    descriptions.change(folder, precision=precision, vision_precision=vision_precision)


def test_the_own_layout_takes_what_it_can_have(tmp_path: Path) -> None:
    described(tmp_path / "int8", "int8", "fp32")
    described(tmp_path / "fp16", "fp16", None)
    for asked, found in (
        ({"vision_encoder": "fp32", "decoder": "int8"}, "int8"),
        ({"vision_encoder": "fp32", "encoder": "int8"}, "int8"),
        ("vision_encoder=fp16,decoder=fp16", "fp16"),
        ({"vision_encoder": "fp32"}, "int8"),
    ):
        read = bundle.read(tmp_path, asked)
        assert read.precision == found and read.has_precision(asked)
    assert bundle.read(tmp_path / "int8", {"vision_encoder": "fp32"}).precision == "int8"
    with pytest.raises(BundleFormatError, match=r"its vision encoder fp32; not .*only the vision encoder can"):
        bundle.read(tmp_path, {"vision_encoder": "fp16", "decoder": "int8"})
    with pytest.raises(BundleFormatError, match="has precisions fp16, int8, not q4"):
        bundle.read(tmp_path, MIXED)


# -------------------------------------------------------------------------------------------------------------- errors


def copy_of(published: Path, tmp_path: Path, *missing: str) -> Path:
    copy = Path(shutil.copytree(published, tmp_path / "copy"))
    for name in missing:
        (copy / "onnx" / name).unlink()
    return copy


def test_a_missing_file_is_named_with_those_that_there_are(published: Path) -> None:
    with pytest.raises(BundleFileMissingError) as caught:
        Florence2.from_pretrained(published, precision={"vision_encoder": "bnb4", "decoder": "q4"})
    said = str(caught.value)
    assert f"{published} has no onnx/vision_encoder_bnb4.onnx. It has " in said
    assert "vision_encoder: fp32, fp16, q8, uint8, q4, q4f16; embed_tokens: fp32," in said
    offered = "vision_encoder=fp32,embed_tokens=fp32,encoder_model=fp32,decoder_model_merged=q4"
    assert f'precision="q4f16" or precision="{offered}"' in said
    assert bundle.read(published, offered).precision == offered


def test_a_folder_without_fp32_says_what_to_pass(published: Path, tmp_path: Path) -> None:
    folder = copy_of(published, tmp_path)
    for path in (folder / "onnx").iterdir():
        if "_quantized" not in path.name:
            path.unlink()
    with pytest.raises(BundleFileMissingError, match=r'has no onnx/vision_encoder\.onnx, .*\. Pass precision="q8"$'):
        Florence2.from_pretrained(folder)
    assert bundle.read(folder, "q8").precision == "q8"


def test_a_module_without_any_file_is_named(published: Path, tmp_path: Path) -> None:
    names = [path.name for path in (published / "onnx").glob("embed_tokens*")]
    folder = copy_of(published, tmp_path, *names)
    with pytest.raises(BundleFileMissingError, match=r"embed_tokens: nothing; .*download what is missing"):
        Florence2.from_pretrained(folder, precision="q8")


def test_on_the_command_line(published: Path) -> None:
    from typer.testing import CliRunner

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, arguments)

    given = "vision_encoder=fp16,decoder=q4"
    shown = run("info", str(published), "--precision", given)
    assert json.loads(shown.stdout)["precision"] == precisions.describe(FULL)
    answered = run(*("run", "caption", str(SAMPLE), "--model", str(published), "--precision", given, "--device", "cpu"))
    assert answered.exit_code == 0, answered.stderr
    refused = run("info", str(published), "--precision", "decoder=bnb4")
    assert refused.exit_code == 2 and "has no onnx/decoder_model_merged_bnb4.onnx. It has" in refused.stderr
    refused = run("info", str(published), "--precision", "vision=fp16")
    assert refused.exit_code == 2 and "modules are vision_encoder" in refused.stderr


# ----------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with LocalHub(published, tmp_path / "cache", monkeypatch) as found:
        yield found


def graphs(hub: LocalHub) -> set[str]:
    return {name for name in hub.requested if not name.endswith(".json")}


@pytest.mark.parametrize("precision", [None, "q8", MIXED])
def test_only_the_files_of_the_precision_are_downloaded(hub: LocalHub, precision: Any) -> None:
    Florence2.from_pretrained("owner/model", device="cpu", precision=precision)
    assert graphs(hub) == {js_file(*module) for module in precisions.js_modules(precision).items()}
    hub.stop()
    Florence2.from_pretrained("owner/model", device="cpu", precision=precision)  # from the cache
    with pytest.raises(BundleNotFoundError, match=r"not complete in the local cache .*It has vision_encoder: .*Pass "):
        Florence2.from_pretrained("owner/model", device="cpu", precision="uint8")


def test_another_precision_needs_only_what_is_new(hub: LocalHub) -> None:
    Florence2.from_pretrained("owner/model", device="cpu", precision=MIXED)
    hub.requested.clear()
    Florence2.from_pretrained("owner/model", device="cpu", precision={"decoder": "q8"})
    assert graphs(hub) == {js_file("vision_encoder", "fp32"), js_file("decoder_model_merged", "q8")}


@pytest.mark.parametrize("precision", ["bnb4", {"vision_encoder": "bnb4", "decoder": "q4"}])
def test_of_a_repository_without_the_files_nothing_large_is_downloaded(hub: LocalHub, precision: Any) -> None:
    said = (
        r"the hub repository 'owner/model' has no onnx/vision_encoder_bnb4\.onnx.*vision_encoder: fp32, fp16, q8.*Pass "
    )
    with pytest.raises(BundleFileMissingError, match=said):
        Florence2.from_pretrained("owner/model", precision=precision)
    assert not graphs(hub)
    with pytest.raises(BundleFormatError, match="unknown precision 'int3'"):
        Florence2.from_pretrained("owner/model", precision="int3")
    assert not graphs(hub)


def test_external_data_comes_with_its_graph(hub: LocalHub, published: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    hub.folder = Path(shutil.copytree(published, tmp_path / "repository"))
    file = hub.folder / js_file("decoder_model_merged", "fp16")
    onnx.save(
        *(onnx.load(str(file)), str(file)),
        save_as_external_data=True,
        location=f"{file.name}_data",
        size_threshold=1024,
    )
    model = Florence2.from_pretrained("owner/model", device="cpu", precision={"decoder": "fp16"})
    assert f"onnx/{file.name}_data" in graphs(hub) and len(graphs(hub)) == 5
    local = Florence2.from_pretrained(published, device="cpu", precision={"decoder": "fp16"})
    options = GenerationOptions(max_new_tokens=8, min_new_tokens=6)
    assert len({each.run(tasks.OCR, SAMPLE, options=options).token_ids for each in (model, local)}) == 1
