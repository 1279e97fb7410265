"""Damaged descriptions: whatever bit is flipped and whatever number is in it, an error of ours or the answers of before."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from florence_onnx import BundleError, BundleFormatError, Florence2, FlorenceError, GenerationOptions
from florence_onnx.bundles import bundle
from florence_onnx.bundles.bundle import Bundle
from florence_onnx.bundles.configuration import configure
from florence_onnx.bundles.description import DIGEST, RANGES, digest, sealed
from florence_onnx.bundles.memory import table
from tests import descriptions

DEMO = bundle.DEMO_DIRECTORY
SAMPLE = DEMO.parent / "samples" / "scene-1.png"
GREEDY = GenerationOptions(num_beams=1, max_new_tokens=12)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the demo bundle, whose description each test writes anew."""
    return Path(shutil.copytree(DEMO, tmp_path_factory.mktemp("description") / "bundle"))


@pytest.fixture(autouse=True)
def described(copy: Path) -> dict[str, Any]:
    """The description of the demo, which the copy has again."""
    shutil.copy(DEMO / bundle.DESCRIPTION, copy)
    return descriptions.read(copy)


@pytest.fixture(scope="module")
def tokens() -> tuple[int, ...]:
    """The demo's answer."""
    return answer(Florence2.from_pretrained("demo", device="cpu"))


def answer(model: Florence2) -> tuple[int, ...]:
    json.dumps(model.info())
    return tuple(model.run("<CAPTION>", SAMPLE, options=GREEDY).token_ids)


# -------------------------------------------------------------------------------------------------------------- digest


def test_the_demo_has_its_digest(described: dict[str, Any]) -> None:
    assert described[DIGEST] == digest(described)
    assert sealed(described) == described


def test_the_digest_is_of_the_content_and_not_of_its_layout(copy: Path, described: dict[str, Any]) -> None:
    turned = {name: described[name] for name in sorted(described, reverse=True)}
    (copy / bundle.DESCRIPTION).write_text(json.dumps(turned, indent=7))
    assert bundle.read(copy) == bundle.read(DEMO).__class__(**{**vars(bundle.read(DEMO)), "path": copy})


def test_a_description_changed_by_hand_is_refused(copy: Path, described: dict[str, Any]) -> None:
    descriptions.write(copy, {**described, "model": {**described["model"], "image_mean": [0.5, 0.5, 0.5]}})
    with pytest.raises(BundleFormatError, match=r"florence_onnx\.json .*its content is not what was written: sha256"):
        bundle.read(copy)


@pytest.mark.parametrize("damaged", [None, 5, "", "0" * 64, ["x"]])
def test_a_digest_that_is_none_is_refused(copy: Path, described: dict[str, Any], damaged: object) -> None:
    descriptions.write(copy, {**described, DIGEST: damaged})
    with pytest.raises(BundleFormatError, match="its content is not what was written"):
        bundle.read(copy)


def test_fields_of_later_versions_are_covered_too(copy: Path, described: dict[str, Any]) -> None:
    later = sealed({**described, "of_a_later_version": {"a": [1, 2.5, "ü\ud800"]}})
    descriptions.write(copy, later)
    bundle.read(copy)
    descriptions.write(copy, {**later, "of_a_later_version": {"a": [1, 2.5, "u"]}})
    with pytest.raises(BundleFormatError, match="not what was written"):
        bundle.read(copy)


def test_a_bundle_of_an_older_version_answers_as_before(copy: Path, tokens: tuple[int, ...]) -> None:
    descriptions.forget_digest(copy)
    assert answer(Florence2.from_pretrained(copy, device="cpu")) == tokens


def test_generation_defaults_stay_changeable(copy: Path) -> None:
    before = (copy / bundle.DESCRIPTION).read_bytes()
    configure(copy, {"num_beams": 1, "max_new_tokens": 3})
    try:
        assert len(Florence2.from_pretrained(copy, device="cpu").run("<CAPTION>", SAMPLE).token_ids) == 4
    finally:
        (copy / bundle.CONFIGURED).unlink()
    assert (copy / bundle.DESCRIPTION).read_bytes() == before


# ----------------------------------------------------------------------------------------------------------- bit flips


def flips(content: bytes, *, seed: int) -> Iterator[bytes]:
    """The content with one bit flipped: one of each byte, chosen by the seed."""
    chosen = random.Random(seed)
    for position in range(len(content)):
        yield flipped(content, position, chosen.randrange(8))


def flipped(content: bytes, position: int, bit: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


def survivors(copy: Path, contents: Iterator[bytes]) -> Iterator[Bundle]:
    """What is read in spite of the damage; an error that is not ours fails the test."""
    for content in contents:
        (copy / bundle.DESCRIPTION).write_bytes(content)
        try:
            yield bundle.read(copy)
        except BundleError as error:
            assert str(copy) in str(error), content
            assert len(str(error)) < 2000


def test_any_flipped_bit_is_refused_or_changes_nothing(copy: Path, tokens: tuple[int, ...]) -> None:
    whole = bundle.read(copy)
    content = (copy / bundle.DESCRIPTION).read_bytes()
    found = list(survivors(copy, flips(content, seed=13)))
    # in the key of the digest, which then is one of an older version; in the 18th digit of a number, which stays the same
    assert 0 < len(found) < 10 and all(each == whole for each in found)
    (copy / bundle.DESCRIPTION).write_bytes(flipped(content, content.rindex(b'"sha256"') + 1, 0))
    assert answer(Florence2.from_pretrained(copy, device="cpu")) == tokens


def test_all_flipped_bits_of_what_pixels_are_made_with_are_refused(copy: Path) -> None:
    """The seven that loaded and answered wrongly were among them."""
    content = (copy / bundle.DESCRIPTION).read_bytes()
    begin, end = content.index(b'"image_mean"'), content.index(b'"decoder_layers"')
    every = (flipped(content, position, bit) for position in range(begin, end) for bit in range(8))
    assert list(survivors(copy, every)) == []


def test_flipped_bits_of_an_older_description_end_in_errors_of_ours(copy: Path) -> None:
    """Without a digest a number may be another one unseen, but no error is one of ONNX Runtime, numpy or `info()`."""
    descriptions.change(copy, files={}, source={}, verification={})
    descriptions.forget_digest(copy)
    whole = bundle.read(copy)
    content = (copy / bundle.DESCRIPTION).read_bytes()
    found = [each for each in survivors(copy, flips(content, seed=7)) if each.sizes != whole.sizes]
    assert len(found) >= 8
    for each in random.Random(7).sample(found, 8):
        try:
            answer(Florence2.from_bundle(each))
        except FlorenceError as error:
            assert len(str(error)) < 2000


# -------------------------------------------------------------------------------------------------------------- ranges

HOSTILE: list[Any] = [
    *(-1, 0, 2**31, 2**63, 10**30, -(10**30), 1.5, 1e300, float("inf"), float("-inf"), float("nan")),
    *(None, True, "7", "", [], {}, [1], {"a": 1}, [[1]], [float("nan")] * 3, [10**30] * 3, [-0.1, 0.5, 0.5]),
    *([0, 0], [10**30, 10**30], [-5, 128], [128, 128, 128], [5e-324, 0.2, 0.2], [0.2, 0.2, 1e9]),
]


def is_possible(name: str, value: object) -> bool:
    """Whether a hostile value is a possible one of this key after all."""
    return (name, value) in [("pad_token_id", 0), ("image_mean", [5e-324, 0.2, 0.2])] and not isinstance(value, bool)


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("has_digest", [True, False])
def test_every_size_has_a_range_that_the_error_names(copy: Path, name: str, has_digest: bool) -> None:
    for value in HOSTILE:
        shutil.copy(DEMO / bundle.DESCRIPTION, copy)
        descriptions.change_model(copy, **{name: value})
        if not has_digest:
            descriptions.forget_digest(copy)
        if is_possible(name, value):
            continue
        with pytest.raises(BundleFormatError, match=rf"florence_onnx\.json .*{name} must be .* from .* to ") as caught:
            bundle.read(copy)
        assert len(str(caught.value)) < 500


def test_the_ranges_are_of_all_sizes() -> None:
    assert set(RANGES) >= {name for name in bundle.ModelSizes.__dataclass_fields__ if name in RANGES}
    assert {"image_size", "image_mean", "image_std", "vocab_size", "pad_token_id"} <= set(RANGES)


def test_a_number_too_long_to_be_read_is_refused(copy: Path, described: dict[str, Any]) -> None:
    text = json.dumps(described).replace('"vocab_size": 1568', f'"vocab_size": {"9" * 5000}')
    (copy / bundle.DESCRIPTION).write_text(text)
    with pytest.raises(BundleFormatError, match=r"florence_onnx\.json cannot be read as JSON"):
        bundle.read(copy)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pad_token_id": 1568}, "pad_token_id must be from 0 to 1567"),
        ({"num_image_tokens": 1024}, "num_image_tokens must be below max_positions, which is 1024"),
        ({"max_positions": 65}, "num_image_tokens must be below max_positions, which is 65"),
    ],
)
def test_sizes_that_limit_one_another(copy: Path, changes: dict[str, int], said: str) -> None:
    descriptions.change_model(copy, **changes)
    with pytest.raises(BundleFormatError, match=said):
        bundle.read(copy)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(
            ({"image_size": [side, side]}, f"says image_size {side}, but .*vision_encoder.onnx has 128")
            for side in (328, 120)
        ),
        ({"image_size": [128, 160]}, "says image_size 160, but .*vision_encoder.onnx has 128"),
        ({"num_image_tokens": 66}, "says num_image_tokens 66, but .* has 65"),
        ({"decoder_heads": 2, "head_dim": 64}, "says decoder_heads 2, but .*decoder.* has 4"),
        ({"head_dim": 33}, r"says decoder_heads \* head_dim 132, but .* has 128"),
        ({"vocab_size": 1569}, "says vocab_size 1569, but .* has 1568"),
    ],
)
def test_sizes_that_the_graphs_do_not_have_are_refused(copy: Path, changes: dict[str, Any], said: str) -> None:
    descriptions.change_model(copy, **changes)
    with pytest.raises(BundleFormatError, match=rf"florence_onnx\.json {said} there .*: .* can only be \d+"):
        Florence2.from_pretrained(copy, device="cpu")


def test_the_decoder_of_a_continuous_batch_is_compared_as_well(copy: Path) -> None:
    descriptions.change_model(copy, vocab_size=1569)
    with pytest.raises(BundleFormatError, match=r"decoder_top\.onnx has 1568 there"):
        Florence2.from_pretrained(copy, device="cpu", max_batch=1)


def test_more_positions_than_the_weights_have_end_in_an_error_of_ours(copy: Path) -> None:
    """No graph states them: they show only at a prompt that is too long for the model."""
    descriptions.change_model(copy, max_positions=8192)
    model = Florence2.from_pretrained(copy, device="cpu")
    with pytest.raises(FlorenceError, match="failed while running"):
        model.run("<CAPTION_TO_PHRASE_GROUNDING>", SAMPLE, text_input="word " * 3000)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": "fp17"}, "precision must be one of int8, fp32, fp16, int4, got 'fp17'"),
        ({"precision": []}, "precision must be one of"),
        ({"vision_precision": "fp15"}, "vision_precision must be one of"),
        ({"source": 5}, "source must be an object"),
        ({"verification": []}, "verification must be an object"),
        ({"memory": 5}, "memory must be an object"),
        ({"memory": {"weights": {}}}, "memory.text_encoder must be pairs of tokens and bytes, from 0 to"),
        ({"files": {"../../../etc/passwd": {"size": 1, "sha256": ""}}}, "files must have names of files in the bundle"),
        ({"files": {"x\0": {"size": 1, "sha256": ""}}}, "files must have names of files in the bundle"),
        ({"files": {"x" * 300: {"size": 1, "sha256": ""}}}, "files must have names of files in the bundle"),
        ({"files": {"decoder.onnx": {"size": -1, "sha256": ""}}}, "files.decoder.onnx must have a size from 0 to"),
        ({"files": {"decoder.onnx": {"size": 10**30, "sha256": ""}}}, "files.decoder.onnx must have a size from 0 to"),
        (
            {"files": {"decoder.onnx": {"size": 67700, "sha256": None}}},
            "files.decoder.onnx must have a size .* a sha256",
        ),
    ],
)
def test_all_else_has_its_range_too(copy: Path, changes: dict[str, Any], said: str) -> None:
    descriptions.change(copy, **changes)
    with pytest.raises(BundleFormatError, match=said):
        bundle.read(copy)


@pytest.mark.parametrize("value", [*HOSTILE[:18], -5, [[1, -1]]])
@pytest.mark.parametrize("name", ["weights", "picture", "text_encoder", "token"])
def test_bytes_of_memory_that_info_cannot_compute_with_are_refused(copy: Path, name: str, value: object) -> None:
    memory = descriptions.read(copy)["memory"]
    descriptions.change(copy, memory={**memory, name: value})
    try:
        json.dumps(table(bundle.read(copy)))
    except BundleFormatError as error:
        assert f"memory.{name} must be" in str(error)


def test_a_file_that_cannot_be_read_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, *arguments: object, **options: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(BundleError, match=r"decoder\.onnx cannot be read: Input/output error"):
        bundle.check_files(copy, {"decoder.onnx": {"size": 67700, "sha256": "0" * 64}})


# ------------------------------------------------------------------------------------------ start tokens, other layout


@pytest.fixture
def generation(copy: Path) -> Iterator[Callable[..., None]]:
    """Changes the copy's generation_config.json for one test, and forgets its hash."""
    own = copy / bundle.GENERATION_CONFIG
    before = own.read_bytes()

    def change(**changes: object) -> None:
        own.write_text(json.dumps({**json.loads(before), **changes}))
        descriptions.change(copy, files={})

    yield change
    own.write_bytes(before)


TOKENS = ("decoder_start_token_id", "eos_token_id", "forced_bos_token_id", "forced_eos_token_id")


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("value", [-2, 1568, 2**31, 10**30, 1.5, "2", float("nan"), [], [2**31]])
def test_tokens_outside_of_the_vocabulary_are_refused(
    copy: Path, generation: Callable[..., None], name: str, value: object
) -> None:
    generation(**{name: value})
    with pytest.raises(BundleFormatError, match=rf"generation_config\.json: .*{name}"):
        bundle.read(copy)


def test_a_start_token_of_minus_one_is_refused(copy: Path, generation: Callable[..., None]) -> None:
    generation(decoder_start_token_id=-1)
    with pytest.raises(BundleFormatError, match="decoder_start_token_id must be a whole number from 0 to 1567, got -1"):
        bundle.read(copy)


@pytest.mark.parametrize("name", ["num_beams", "length_penalty", "no_repeat_ngram_size", "temperature", "max_length"])
def test_hostile_generation_settings_end_in_errors_of_ours(
    copy: Path, generation: Callable[..., None], name: str
) -> None:
    for value in HOSTILE:
        generation(**{name: value})
        try:
            json.dumps(vars(bundle.read(copy).generation.resolve(None)))
        except BundleFormatError as error:
            assert bundle.GENERATION_CONFIG in str(error) and name.replace("max_length", "max_new_tokens") in str(error)


CONFIGS = {
    "config.json": {
        "text_config": {
            "decoder_layers": 3,
            "decoder_attention_heads": 4,
            "d_model": 128,
            "max_position_embeddings": 1024,
            "vocab_size": 1568,
            "pad_token_id": 1,
        },
        "vision_config": {"patch_stride": [4, 2, 2, 2]},
    },
    "preprocessor_config.json": {
        "size": {"width": 128, "height": 128},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
    "generation_config.json": {"decoder_start_token_id": 2, "eos_token_id": 2},
}
"""What the layout of transformers.js has instead of a description."""


def places(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all values in a JSON object."""
    if path:
        yield path
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from places(inner, (*path, name))


def replaced(content: dict[str, Any], path: tuple[str, ...], value: object) -> dict[str, Any]:
    name, *rest = path
    return {**content, name: replaced(content[name], tuple(rest), value) if rest else value}


def test_hostile_configs_of_transformers_js_end_in_errors_of_ours(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    for graph in bundle.JS_GRAPHS:
        (tmp_path / "onnx" / f"{graph}.onnx").touch()
    for file, content in CONFIGS.items():
        (tmp_path / file).write_text(json.dumps(content))
    assert bundle.read(tmp_path).layout == "transformers.js"
    num_refused = 0
    for file, content in CONFIGS.items():
        for path in places(content):
            for value in HOSTILE:
                (tmp_path / file).write_text(json.dumps(replaced(content, path, value)))
                try:
                    bundle.read(tmp_path)
                except BundleError as error:
                    num_refused += 1
                    assert str(tmp_path) in str(error)
        (tmp_path / file).write_text(json.dumps(content))
    assert num_refused > 200
