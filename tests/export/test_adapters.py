"""Adapters as PEFT writes them, trained on either class: merged, and verified against PEFT's own output."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("transformers", reason="needs the export extra")
peft = pytest.importorskip("peft", reason="pip install 'florence-onnx[peft]'")
import typer  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import Florence2ForConditionalGeneration  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from export.__main__ import main  # noqa: E402
from export.checkpoints.adapters import attach_adapter, read_adapter  # noqa: E402
from export.checkpoints.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from export.checkpoints.diagnosis import diagnose  # noqa: E402
from export.commands.export import export  # noqa: E402
from florence_onnx.bundles import bundle  # noqa: E402
from florence_onnx.errors import CheckpointError, MissingExtraError  # noqa: E402
from tests import checkpoints  # noqa: E402
from tests.command_line import run_here  # noqa: E402
from tests.conftest import Exported  # noqa: E402
from tests.export.conftest import edit_json  # noqa: E402
from tests.export.test_checkpoint import logits  # noqa: E402
from tests.local_hub import LocalHub  # noqa: E402
from tests.microsoft_layout import original_names  # noqa: E402

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc2", "qkv", "lm_head"]
"""What notebooks train: attention, half of the feed-forward layers, and the head, which is tied to the embedding."""

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "head and embedding": {"modules_to_save": ["lm_head", "shared", "embed_tokens"], "target_modules": ["q_proj"]},
    "a whole part": {"modules_to_save": ["multi_modal_projector"], "target_modules": ["v_proj"]},
    "rank-stabilised": {
        "use_rslora": True,
        "rank_pattern": {"encoder.layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"fc2": 7},
    },
    "dora": {"use_dora": True, "target_modules": ["q_proj", "out_proj"]},
}


def train(base: Path, target: Path, **changes: Any) -> Any:
    """Writes an adapter with random weights; returns PEFT's own model."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": TARGETS, **changes})
    model = peft.get_peft_model(Florence2ForConditionalGeneration.from_pretrained(base).eval(), config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            with torch.no_grad():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(target)
    return model


def peft_logits(checkpoint: Checkpoint, model: Any) -> Any:
    """What `logits` computes, by another model on the checkpoint's inputs."""
    live = Checkpoint(model.get_base_model(), checkpoint.tokenizer, {}, checkpoint.preprocessing, {})
    return logits(live)


def assert_equal_logits(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def rename_for_microsoft(adapter: Path, target: Path, depths: list[int]) -> Path:
    """The same adapter as it would have been trained on Microsoft's class."""
    shutil.copytree(adapter, target)
    names = {
        native.rpartition(".")[0]: original.rpartition(".")[0] for original, native in original_names(depths).items()
    }

    def rename(name: str) -> str:
        path = name.removeprefix("base_model.model.")
        module, _, rest = path.partition(".lora_")
        if module in names:
            return f"base_model.model.{names[module]}.lora_{rest}"
        return "base_model.model." + path.replace("model.language_model.", "language_model.model.").replace(
            "lm_head", "language_model.lm_head"
        )

    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({rename(name): tensor for name, tensor in weights.items()}, target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize("name", list(CONFIGS))
def test_an_adapter_computes_what_peft_computes(native_folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    base = native_folders["tiny"]
    tuned = train(base, tmp_path / "adapter", **CONFIGS[name])
    loaded = load_checkpoint(tmp_path / "adapter")  # its adapter_config.json names the base
    expected = peft_logits(loaded, tuned)
    assert not torch.allclose(expected, logits(load_checkpoint(base)), atol=0.1), "the adapter changes the answers"
    assert_equal_logits(logits(loaded), expected)
    assert not any("lora" in each for each, _ in loaded.model.named_modules())
    # the reference is PEFT's own layers on what transformers loads, not what was merged
    reference = Checkpoint(loaded.reference, loaded.tokenizer, {}, loaded.preprocessing, {})
    assert name == "head and embedding" or any("lora" in each for each, _ in loaded.reference.named_modules())
    assert_equal_logits(logits(reference), expected)
    assert loaded.source["adapter"] == "adapter"
    assert "LORA adapter adapter is merged into tiny" in loaded.notes[-1]


def test_adapter_beside_a_base(native_folders: dict[str, Path], microsoft: Path, tmp_path: Path) -> None:
    """Trained on Microsoft's class or on the native one, for a base in either layout: the answers are the same."""
    base = native_folders["tiny"]
    tuned = train(base, tmp_path / "native", **CONFIGS["rank-stabilised"])
    other = rename_for_microsoft(tmp_path / "native", tmp_path / "original", [1, 1, 1, 1])
    expected = peft_logits(load_checkpoint(base), tuned)
    for adapter in (tmp_path / "native", other):
        assert read_adapter(adapter).is_microsoft == (adapter == other)
        assert_equal_logits(logits(load_checkpoint(base, adapter=adapter)), expected)
        loaded = load_checkpoint(adapter, base=microsoft)
        assert_equal_logits(logits(loaded), expected)
        assert loaded.source["layout"] == "microsoft"


def test_an_adapter_is_exported_and_verified(native_folders: dict[str, Path], tmp_path: Path) -> None:
    train(native_folders["tiny"], tmp_path / "adapter")
    edit_json(
        tmp_path / "adapter" / "adapter_config.json", lambda config: config.update(base_model_name_or_path="/gone/away")
    )
    application = typer.Typer()
    application.command()(export)
    out, base = tmp_path / "out", str(native_folders["tiny"])
    answer = CliRunner().invoke(application, [str(tmp_path / "adapter"), str(out), "--base", base, "--processor", base])
    assert answer.exit_code == 0, answer.output
    assert "LORA adapter adapter is merged into tiny" in " ".join(answer.stderr.split())
    written = bundle.read(out)
    assert (written.source["name"], written.source["adapter"]) == ("adapter", "adapter")
    for tokens in written.verification["tokens"].values():
        assert tokens["equal"] == tokens["total"] > 0
    plain = (tmp_path / "out" / bundle.WEIGHTS).stat().st_size
    assert plain > 4 * sum(
        tensor.numel() for tensor in load_file(native_folders["tiny"] / "model.safetensors").values()
    ), "the head was trained and the embedding was not: they are no longer one"
    # verify takes the same options, with the adapter as reference and with the base
    weights_only = Path(shutil.copytree(native_folders["tiny"], tmp_path / "weights"))
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (weights_only / name).unlink()
    for reference, *options in (
        (str(tmp_path / "adapter"), "--base", base, "--processor", base),
        (str(weights_only), "--adapter", str(tmp_path / "adapter"), "--processor", base),
    ):
        sure = ("--task", "ocr", "--beams", "1", "--max-new-tokens", "6", "--min-token-agreement", "1")
        done = run_here(main, "verify", out, "--reference", reference, *options, *sure)
        assert done.returncode == 0, done.stderr
    done = run_here(main, "verify", out, "--reference", base, "--task", "ocr", "--min-token-agreement", "1")
    assert done.returncode == 1, "without the adapter the answers are others"


@pytest.mark.parametrize("option", ["--adapter", "--base", "--processor", "--revision"])
def test_a_bundle_as_reference_takes_no_parts_of_a_checkpoint(tiny: Exported, option: str) -> None:
    done = run_here(main, "verify", tiny.bundle, "--reference", tiny.bundle, option, "x")
    assert done.returncode == 2
    assert f"{option} go with a checkpoint as reference" in " ".join(done.stderr.split())


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_an_unmerged_state_dict(native_folders: dict[str, Path], tmp_path: Path, prefix: str) -> None:
    base = native_folders["tiny"]
    folder = Path(shutil.copytree(base, tmp_path / "whole"))
    tuned = train(base, tmp_path / "adapter", modules_to_save=["image_projection"])
    state = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    save_file(
        {prefix + name.removeprefix("base_model.model."): state[name] for name in state}, folder / "model.safetensors"
    )
    with pytest.raises(
        CheckpointError, match=r"an adapter that is not merged .*no adapter_config\.json.*merge_and_unload"
    ):
        load_checkpoint(folder)
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", folder)
    loaded = load_checkpoint(folder)
    expected = peft_logits(loaded, tuned)
    assert_equal_logits(logits(loaded), expected)
    reference = Checkpoint(loaded.reference, loaded.tokenizer, {}, loaded.preprocessing, {})
    assert_equal_logits(logits(reference), expected)


def test_whole_weights_beside_an_adapter_config_are_taken_as_merged(folder: Path) -> None:
    expected = logits(load_checkpoint(folder))
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "owner/base", "peft_type": "LORA"})
    )
    loaded = load_checkpoint(folder)
    assert torch.equal(logits(loaded), expected)
    assert loaded.reference is loaded.model  # transformers would ask the hub for the base


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(base_model_name_or_path="/gone/away"), r"no folder /gone/away.*--base"),
        (lambda config: config.update(base_model_name_or_path=None), r"names no base model; give it with --base"),
        (lambda config: config.update(target_modules=["nothing"]), "PEFT cannot apply the adapter"),
        (
            lambda config: config.update(target_modules=["q_proj", "k_proj"]),
            r"has no place for \(12\): .*v_proj.*lora_A",
        ),
        (lambda config: config.update(target_modules=["q_proj", "v_proj", "k_proj", "fc1"]), r"lacks weights"),
        (lambda config: config.update(r=3), r"PEFT cannot apply the adapter .*size mismatch for .*_proj"),
        (
            lambda config: (config.clear(), config.update(peft_type="PROMPT_TUNING", base_model_name_or_path="BASE")),
            "PROMPT_TUNING, which adds tokens",
        ),
    ],
)
def test_adapters_that_do_not_fit(
    native_folders: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    adapter = tmp_path / "adapter"
    train(native_folders["tiny"], adapter, target_modules=["q_proj", "v_proj"])
    edit_json(adapter / "adapter_config.json", change)
    has_base = "base" not in message
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(adapter, base=native_folders["tiny"] if has_base else None)


def test_an_adapter_on_the_hub(
    native_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = train(native_folders["tiny"], tmp_path / "adapter", target_modules=["q_proj"])
    with LocalHub(tmp_path / "adapter", tmp_path / "cache", monkeypatch):
        loaded = load_checkpoint("owner/model", base=native_folders["tiny"])
    assert_equal_logits(logits(loaded), peft_logits(loaded, tuned))
    assert loaded.source["name"] == "owner/model"


def test_a_base_on_the_hub(native_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = train(native_folders["tiny"], tmp_path / "adapter", target_modules=["q_proj"])
    edit_json(
        tmp_path / "adapter" / "adapter_config.json",
        lambda config: config.update(base_model_name_or_path="owner/model"),
    )
    with LocalHub(native_folders["tiny"], tmp_path / "cache", monkeypatch):
        loaded = load_checkpoint(tmp_path / "adapter")
        assert_equal_logits(logits(loaded), peft_logits(loaded, tuned))


def test_the_doctor_examines_an_adapter(
    native_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(native_folders["tiny"], tmp_path / "adapter", target_modules=["q_proj"])
    found = diagnose(tmp_path / "adapter")
    assert found.can_be_exported
    (note,) = [each.text for each in found.findings if each.topic == "adapter"]
    assert "LORA, 12 tensors, trained on transformers' class: r 4, lora_alpha 16, target_modules ['q_proj']" in note
    monkeypatch.setattr("export.checkpoints.diagnosis.find_spec", lambda name: None)
    found = diagnose(native_folders["tiny"], adapter=tmp_path / "adapter")
    assert not found.can_be_exported
    assert any("pip install 'florence-onnx[export,peft]'" in each.text for each in found.findings)


def test_a_base_for_what_is_no_adapter(native_folders: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="is no adapter"):
        load_checkpoint(native_folders["tiny"], base=native_folders["odd"])
    with pytest.raises(CheckpointError, match="is no adapter as PEFT writes it"):
        load_checkpoint(native_folders["tiny"], adapter=native_folders["odd"])


def test_without_peft_the_extra_is_named(
    native_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(native_folders["tiny"], tmp_path / "adapter", target_modules=["q_proj"])
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"florence-onnx\[peft\]"):
        attach_adapter(
            checkpoints.build_model(checkpoints.tiny_config()), read_adapter(tmp_path / "adapter"), merge=True
        )
