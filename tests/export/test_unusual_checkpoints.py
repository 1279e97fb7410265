"""Checkpoints that are stored, damaged or quantized in ways that people have: read, or refused by name with the way
out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("transformers", reason="needs the export extra")
from safetensors.torch import load_file, save_file  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from export.bundles.writer import export_bundle  # noqa: E402
from export.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from export.checkpoints.diagnosis import Diagnosis, diagnose  # noqa: E402
from export.commands import doctor  # noqa: E402
from export.transformers_js.writer import export_transformers_js  # noqa: E402
from export.verification.activations import check_activations  # noqa: E402
from florence_onnx.errors import CheckpointError  # noqa: E402
from tests.export.conftest import edit_json, edit_weights  # noqa: E402
from tests.export.test_checkpoint import assert_same_weights  # noqa: E402
from tests.local_hub import LocalHub  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 463221266\n"
QKV = "model.vision_tower.blocks.1.0.spatial_block.window_attn.qkv.weight"
NORM = "model.vision_tower.convs.2.norm.weight"


# ------------------------------------------------------------------------------------------------------------- prefixes


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod."])
def test_prefixes_of_wrappers(folder: Path, microsoft: Path, prefix: str) -> None:
    for place in (folder, microsoft):
        expected = load_checkpoint(place)
        weights = load_file(place / "model.safetensors")
        save_file({prefix + name: tensor for name, tensor in weights.items()}, place / "model.safetensors")
        loaded = load_checkpoint(place)
        assert_same_weights(loaded, expected)
        assert loaded.notes == (f"all weights of {place.name} are stored under the prefix {prefix}, which is left out",)
        # from_pretrained would initialise every weight at random
        assert loaded.reference is loaded.model


def test_a_part_that_was_compiled(folder: Path) -> None:
    expected = load_checkpoint(folder)
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("vision_tower.", "vision_tower._orig_mod."): tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors")
    assert_same_weights(load_checkpoint(folder), expected)


def test_two_weights_of_one_name(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({QKV.replace("blocks", "_orig_mod.blocks"): weights[QKV] + 1}))
    with pytest.raises(CheckpointError, match="the same name without the prefix _orig_mod"):
        load_checkpoint(folder)


# ----------------------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite(folder: Path, microsoft: Path, value: str) -> None:
    edit_weights(folder, lambda weights: weights[QKV].view(-1)[:3].fill_(float(value)))
    kind = "NaN" if value == "nan" else "infinite"
    with pytest.raises(CheckpointError, match=rf"not finite \(1\): {QKV} \(3 {kind} of \d+\)\. .*earlier checkpoint"):
        load_checkpoint(folder)
    name = "language_model.model.shared.weight"
    edit_weights(microsoft, lambda weights: weights[name].view(-1)[:1].fill_(float(value)))
    with pytest.raises(CheckpointError, match=rf"{name} \(1 {kind} of"):
        load_checkpoint(microsoft)


@pytest.mark.parametrize("write", [export_bundle, export_transformers_js])
def test_activations_that_overflow(folder: Path, tmp_path: Path, write: Callable[..., object]) -> None:
    """All weights are finite; in the second convolution they are not small."""
    edit_weights(folder, lambda weights: weights[NORM].fill_(3e38))
    loaded = load_checkpoint(folder)
    layer = NORM.removesuffix(".weight")
    with pytest.raises(
        CheckpointError, match=rf"overflows: in float32 the output of its layer {layer} has .* infinite of"
    ):
        write(loaded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sound_activations(folder: Path, photographs: list[Any]) -> None:
    check_activations(load_checkpoint(folder), photographs[:1])


# -------------------------------------------------------------------------------------------------------------- git-lfs


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json"])
def test_git_lfs_pointers(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name} is a git-lfs pointer.*git lfs pull"):
        load_checkpoint(folder)


def test_git_lfs_pointers_of_other_forms(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a git-lfs pointer"):
        load_checkpoint(folder)
    (folder / "part-1.safetensors").write_text(POINTER)
    (folder / "pytorch_model.bin").unlink()
    shards = {"weight_map": dict.fromkeys(weights, "part-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))
    with pytest.raises(CheckpointError, match=r"part-1\.safetensors is a git-lfs pointer"):
        load_checkpoint(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"merges\.txt is a git-lfs pointer"):
        load_checkpoint(folder)


def test_a_git_lfs_pointer_in_a_snapshot_of_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "model.safetensors").write_text(POINTER)
    with LocalHub(folder, tmp_path / "cache", monkeypatch), pytest.raises(CheckpointError, match="git lfs pull"):
        load_checkpoint("owner/model")


# ------------------------------------------------------------------------------------------------------------ quantized


def _bitsandbytes_int8(weights: dict[str, Any]) -> None:
    weights[QKV] = weights[QKV].to(torch.int8)
    weights[QKV.replace("weight", "SCB")] = torch.ones(len(weights[QKV]))


def _bitsandbytes_nf4(weights: dict[str, Any]) -> None:
    weights[QKV] = torch.zeros(1536, 1, dtype=torch.uint8)
    weights[f"{QKV}.absmax"] = torch.zeros(48)
    weights[f"{QKV}.quant_state.bitsandbytes__nf4"] = torch.zeros(80, dtype=torch.uint8)


def _gptq(weights: dict[str, Any]) -> None:
    del weights[QKV]
    for name, kind in (
        ("qweight", torch.int32),
        ("qzeros", torch.int32),
        ("scales", torch.float16),
        ("g_idx", torch.int32),
    ):
        weights[QKV.replace("weight", name)] = torch.zeros(4, 4, dtype=kind)


def _awq(weights: dict[str, Any]) -> None:
    _gptq(weights)
    del weights[QKV.replace("weight", "g_idx")]


def _fp8(weights: dict[str, Any]) -> None:
    weights[QKV] = weights[QKV].to(torch.float8_e4m3fn)


def _fp8_scaled(weights: dict[str, Any]) -> None:
    _fp8(weights)
    weights[f"{QKV}_scale_inv"] = torch.ones(1, 1)


def _packed(weights: dict[str, Any]) -> None:
    weights[f"{QKV}_packed"] = weights.pop(QKV).to(torch.int32)


@pytest.mark.parametrize(
    ("change", "tool"),
    [
        (_bitsandbytes_int8, "bitsandbytes"),
        (_bitsandbytes_nf4, "bitsandbytes"),
        (_gptq, "GPTQ"),
        (_awq, "AWQ"),
        (_fp8, r"fp8 \(.*qkv\.weight is torch\.float8_e4m3fn\)\."),
        (_fp8_scaled, "fp8"),
        (_packed, "compressed-tensors"),
    ],
)
def test_quantized_checkpoints_are_named(folder: Path, change: Callable[[dict[str, Any]], None], tool: str) -> None:
    edit_weights(folder, change)
    with pytest.raises(CheckpointError, match=rf"is quantized by {tool}.*--precision int8 or int4"):
        load_checkpoint(folder)
    edit_json(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "x"}))
    with pytest.raises(CheckpointError, match=rf"is quantized by {tool}"):
        load_checkpoint(folder)


def test_a_quantization_config_alone(folder: Path) -> None:
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit_json(folder / "config.json", lambda values: values.update(quantization_config=config))
    with pytest.raises(
        CheckpointError, match=r"quantization_config \(bitsandbytes\), but all weights are floats.*remove"
    ):
        load_checkpoint(folder)


# ------------------------------------------------------------------------------------------------------------ processor


def test_a_folder_with_weights_only(folder: Path, microsoft: Path, tmp_path: Path) -> None:
    """As OmniParser's `icon_caption`: config.json, generation_config.json and model.safetensors."""
    for place in (folder, microsoft):
        bare = tmp_path / f"bare-{place.name}"
        bare.mkdir()
        for name in ("config.json", "generation_config.json", "model.safetensors"):
            (bare / name).write_bytes((place / name).read_bytes())
        with pytest.raises(CheckpointError, match="--processor microsoft/Florence-2-base"):
            load_checkpoint(bare)
        loaded, expected = load_checkpoint(bare, processor=folder), load_checkpoint(place)
        assert_same_weights(loaded, expected)
        assert loaded.preprocessing == expected.preprocessing
        assert loaded.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
        assert loaded.source["name"] == bare.name


def test_a_processor_from_the_hub(
    folder: Path, native_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tokenizer.json", "preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink()
    with LocalHub(native_folders["tiny"], tmp_path / "cache", monkeypatch) as hub:
        loaded = load_checkpoint(folder, processor="owner/model")
    assert "model.safetensors" not in hub.requested
    assert loaded.preprocessing == load_checkpoint(native_folders["tiny"]).preprocessing


# --------------------------------------------------------------------------------------------------------------- doctor


def texts(found: Diagnosis, verdict: str) -> str:
    return "\n".join(f"{each.topic}: {each.text}" for each in found.findings if each.verdict == verdict)


def test_the_doctor_of_a_sound_checkpoint(folder: Path, microsoft: Path) -> None:
    for place, layout in (
        (folder, "transformers' native one"),
        (microsoft, "Microsoft's, with remote code that is never run"),
    ):
        found = diagnose(place)
        assert found.can_be_exported and not texts(found, "refused")
        said = texts(found, "ok")
        for part in (
            f"layout: {layout}",
            "sizes: vision 16-32-64-64 wide, 1-1-1-1 deep, window 4; text 64 wide, 2 + 2 layers, 1024 positions",
            "vocabulary 1399",
            "images: 128 x 128 pixels, 17 image tokens",
            "of 32 to 992 pixels",
            "tokens: decoder_start_token_id 2, bos_token_id 0, pad_token_id 1, eos_token_id 2",
            "num_beams 3, no_repeat_ngram_size 3, early_stopping True, forced_bos_token_id 0, forced_eos_token_id 2",
            "entries for 1399 rows, <od> at",
            "of float32)",
            "tied to the token embedding",
            "GB of disk",
        ):
            assert part in said, (part, said)
    assert "in generation_config.json to no effect: early_stopping False" in texts(diagnose(microsoft), "note")


def test_the_doctor_finds_all_faults_at_once(folder: Path) -> None:
    edit_json(folder / "generation_config.json", lambda config: config.update(stop_strings=["a"], max_length=50))
    (folder / "tokenizer.json").unlink()
    edit_json(folder / "preprocessor_config.json", lambda config: config.update(resample=2))
    weights = load_file(folder / "model.safetensors")
    weights[QKV][0, 0] = float("nan")
    save_file({f"module.{name}": tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    found = diagnose(folder)
    assert not found.can_be_exported
    refused = texts(found, "refused")
    for part in ("unknown to the runtime: stop_strings", "no tokenizer.json", "resample is 2", f"{QKV} (1 NaN"):
        assert part in refused, part
    notes = texts(found, "note")
    assert "under the prefix module." in notes and "max_length 50" in notes


@pytest.mark.parametrize("size", [32, 96, 992])
def test_the_sizes_that_the_doctor_names_are_those_of_transformers(folder: Path, size: int) -> None:
    loaded = load_checkpoint(folder)
    for height, width in ((size, size), (32, size)):
        with torch.inference_mode():
            features = loaded.reference.get_image_features(torch.zeros(1, 3, height, width))
        assert features.shape[1] == (height // 32) * (width // 32) + 1
    assert (992 // 32) ** 2 + 1 + 2 <= 1024 < (1024 // 32) ** 2 + 1 + 2


def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "export", "doctor", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "can be exported" in done.stdout and "17 image tokens" in done.stdout
    (folder / "model.safetensors").write_text(POINTER)
    answer = CliRunner().invoke(doctor.app, ["doctor", str(folder), "--json"])
    assert answer.exit_code == 1
    report = json.loads(answer.stdout)
    assert report["can_be_exported"] is False
    assert [each["topic"] for each in report["findings"] if each["verdict"] == "refused"] == ["weights"]
    answer = CliRunner().invoke(doctor.app, ["doctor", str(tmp_path / "nothing")])
    assert answer.exit_code == 1 and "no folder" in answer.stdout and answer.exception.__class__ is SystemExit
