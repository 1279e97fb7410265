"""The forms in which Florence-2 is published: each loads as its own library would, or is refused by name.

No weights are downloaded: `published_checkpoints.json` has the facts, from which folders with random tiny weights are
made.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
transformers = pytest.importorskip("transformers", reason="needs the export extra")
from safetensors.torch import load_file, save_file  # noqa: E402

from export.checkpoints import microsoft as layout  # noqa: E402
from export.checkpoints.checkpoint import build_config, load_checkpoint  # noqa: E402
from export.checkpoints.diagnosis import diagnose  # noqa: E402
from florence_onnx.errors import CheckpointError  # noqa: E402
from tests import checkpoints  # noqa: E402
from tests.export.conftest import edit_json  # noqa: E402
from tests.export.test_adapters import rename_for_microsoft, train  # noqa: E402
from tests.microsoft_layout import original_config, write_microsoft  # noqa: E402

PUBLISHED: list[dict[str, Any]] = json.loads(Path(__file__).with_name("published_checkpoints.json").read_text())[
    "checkpoints"
]
EMBEDDINGS = {
    "shared": "language_model.model.shared.weight",
    "head": "language_model.lm_head.weight",
    "encoder": "language_model.model.encoder.embed_tokens.weight",
    "decoder": "language_model.model.decoder.embed_tokens.weight",
}
NUM_PARAMETERS = {"base": 231_414_016, "large": 770_173_952, "large-4096": 776_465_408}
"""Of the weights; the vocabulary has 51,289 rows in Microsoft's layout."""


def all_defaults() -> dict[str, Any]:
    """What save_pretrained of a remote class wrote into text_config: every setting of a config, at its default or
    null."""
    values = transformers.PretrainedConfig()._get_global_generation_defaults()
    return {
        **values,
        "num_beams": 3,
        "no_repeat_ngram_size": 3,
        "early_stopping": True,
        "forced_bos_token_id": 0,
        "forced_eos_token_id": 2,
    }


def write(facts: dict[str, Any], native: Path, target: Path) -> Path:
    """Makes the folder that `facts` describe."""
    if facts["layout"] == "onnx":
        (target / "onnx").mkdir(parents=True)
        for name in ("config.json", "generation_config.json", "tokenizer.json", "preprocessor_config.json"):
            shutil.copy(native / name, target / name)
        return target
    if facts["layout"] == "other":
        target.mkdir()
        (target / "config.json").write_text(json.dumps({"model_type": "llava", "vision_config": {}, "text_config": {}}))
        return target
    if facts["layout"] == "adapter":
        train(native, target.with_name("native-adapter"), target_modules=facts["target_modules"])
        return rename_for_microsoft(target.with_name("native-adapter"), target, [1, 1, 1, 1])
    dtype = getattr(torch, facts["dtype"])
    if facts["layout"] == "transformers":
        shutil.copytree(native, target)
        weights = {name: tensor.to(dtype) for name, tensor in load_file(native / "model.safetensors").items()}
    else:
        write_microsoft(native, target, dtype=dtype)
        weights = load_file(target / "model.safetensors")
        kept = EMBEDDINGS.values() if facts["tied"] == "all four" else [EMBEDDINGS[facts["tied"]]]
        weights = {name: tensor for name, tensor in weights.items() if name not in EMBEDDINGS.values() or name in kept}
    write_weights(weights, target, facts["weights"])
    write_tokenizer(target, facts["tokenizer"])
    defaults = all_defaults() if facts.get("text_config") else {}
    edit_json(target / "config.json", lambda config: config["text_config"].update(defaults | facts.get("text", {})))
    edit_json(target / "config.json", lambda config: config.update(facts.get("top", {})))
    (target / "generation_config.json").unlink()
    if facts["generation_config"] is not None:
        (target / "generation_config.json").write_text(json.dumps(facts["generation_config"]))
    return target


def write_weights(weights: dict[str, Any], target: Path, form: str) -> None:
    (target / "model.safetensors").unlink()
    if form == "bin":
        torch.save(weights, target / "pytorch_model.bin")
    elif form == "shards":
        places = {name: f"model-{1 + index % 2:05}-of-00002.safetensors" for index, name in enumerate(weights)}
        for shard in set(places.values()):
            save_file({name: weights[name] for name in weights if places[name] == shard}, target / shard)
        (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    else:
        if form == "mlx":
            name = next(name for name in weights if name.endswith("q_proj.weight"))
            for part in ("scales", "biases"):
                weights[name.replace("weight", part)] = torch.zeros(4, 4)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, target / "model.safetensors")


def write_tokenizer(target: Path, form: str) -> None:
    if form == "plain":  # without the tokens that Microsoft's processor adds in code
        checkpoints.plain_tokenizer().save(str(target / "tokenizer.json"))
    elif form == "slow":
        content = json.loads(checkpoints.build_tokenizer().to_str())
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        vocab = content["model"]["vocab"] | {token: added[token] for token in ("<s>", "<pad>", "</s>", "<unk>")}
        (target / "vocab.json").write_text(json.dumps(vocab))
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
        (target / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        listed = {token: added[token] for token in checkpoints.added_tokens()}
        (target / "added_tokens.json").write_text(json.dumps(listed))
        (target / "tokenizer.json").unlink()
    elif form == "none":
        for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
            (target / name).unlink()


@pytest.mark.parametrize("facts", PUBLISHED, ids=[facts["name"] for facts in PUBLISHED])
def test_it_loads_or_is_refused_by_name(facts: dict[str, Any], native_folders: dict[str, Path], tmp_path: Path) -> None:
    native = native_folders["tiny"]
    folder = write(facts, native, tmp_path / "published")
    extra: dict[str, Any] = {}
    if facts["layout"] == "adapter":
        extra["base"] = write_microsoft(native, tmp_path / "base", dtype=torch.float16)
    if facts.get("needs_processor"):
        with pytest.raises(CheckpointError, match="--processor microsoft/Florence-2-base"):
            load_checkpoint(folder)
        extra["processor"] = native
    found = diagnose(folder, **extra)
    assert found.can_be_exported == ("refused" not in facts), found.findings
    if "refused" in facts:
        with pytest.raises(CheckpointError, match=facts["refused"]):
            load_checkpoint(folder)
        return
    loaded = load_checkpoint(folder, **extra)
    generation = loaded.generation
    assert [
        generation[name] for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id", "eos_token_id")
    ] == [2, 0, 1, 2]
    assert (generation["num_beams"], generation["forced_eos_token_id"]) == (3, 2)
    assert set(loaded.notes) == set() if "note" not in facts else any(facts["note"] in note for note in loaded.notes)
    if facts["layout"] != "adapter":
        dtype = getattr(torch, facts["dtype"])
        expected = load_file(native / "model.safetensors")
        assert all(torch.equal(loaded.model.state_dict()[name], expected[name].to(dtype).float()) for name in expected)
        assert loaded.source["dtype"] == facts["dtype"]


@pytest.mark.parametrize("size", list(NUM_PARAMETERS))
def test_the_real_sizes_in_both_layouts(size: str) -> None:
    """Every weight of the real models has a name in Microsoft's layout, without allocating one."""
    config = checkpoints.full_size_config(size.partition("-")[0]).to_dict()
    config["text_config"].update(max_position_embeddings=4096 if size == "large-4096" else 1024, vocab_size=51289)
    original = original_config(config)
    assert layout.is_microsoft(original) and not layout.is_microsoft(config)
    for values, is_microsoft in ((config, False), (original, True)):
        with torch.device("meta"):
            model = transformers.Florence2ForConditionalGeneration(build_config(values, is_microsoft))
        model.tie_weights()
        assert sum(parameter.numel() for parameter in model.parameters()) == NUM_PARAMETERS[size]
    names = [layout.stored_name(name) for name in model.state_dict()]
    assert len(set(names)) == len(names)
    assert not any(name.startswith("model.") for name in names)
