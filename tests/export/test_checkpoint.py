"""Loading checkpoints of both layouts from every kind of file, and the errors for faulty ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
transformers = pytest.importorskip("transformers", reason="needs the export extra")

from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from export.checkpoints.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from export.checkpoints.preprocessing import count_image_tokens  # noqa: E402
from export.checkpoints.tokenizer import ADDED_TOKENS, load_tokenizer  # noqa: E402
from florence_onnx.errors import CheckpointError  # noqa: E402
from tests import checkpoints  # noqa: E402
from tests.export.conftest import edit_json, edit_weights  # noqa: E402
from tests.local_hub import COMMIT, LocalHub  # noqa: E402
from tests.microsoft_layout import write_microsoft  # noqa: E402
from tests.shared_data import NO_SHARED  # noqa: E402

TOKENIZER = Path(__file__).resolve().parents[3] / "shared" / "data" / "tokenizer"
TOKEN_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}

SHARED = "model.language_model.shared.weight"
ENCODER_EMBEDDING = "model.language_model.encoder.embed_tokens.weight"
HEAD = "lm_head.weight"


def state(checkpoint: Checkpoint) -> dict[str, Any]:
    return dict(checkpoint.model.state_dict())


def assert_same_weights(one: Checkpoint, other: Checkpoint) -> None:
    left, right = state(one), state(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def logits(checkpoint: Checkpoint) -> Any:
    config = checkpoint.config
    generator = torch.Generator().manual_seed(0)
    width, height = checkpoint.preprocessing.image_size
    images = torch.tensor([[config.image_token_id] * checkpoint.num_image_tokens + [0, 40, 50, 60, 2]] * 2)
    pixels = torch.randn(2, 3, height, width, generator=generator)
    with torch.inference_mode():
        return checkpoint.model(
            input_ids=images, pixel_values=pixels, decoder_input_ids=torch.tensor([[2, 0, 70]] * 2)
        ).logits


# ---------------------------------------------------------------------------------------------------------- both layouts


@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_native_equals_from_pretrained(native_folders: dict[str, Path], name: str) -> None:
    loaded = load_checkpoint(native_folders[name])
    reference = transformers.Florence2ForConditionalGeneration.from_pretrained(native_folders[name]).eval()
    expected = reference.state_dict()
    found = state(loaded)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not loaded.model.training
    assert loaded.model.lm_head.weight is loaded.model.model.language_model.shared.weight
    assert loaded.source["layout"] == "transformers"
    assert loaded.source["name"] == name
    assert loaded.num_image_tokens == checkpoints.num_image_tokens(loaded.config)
    assert loaded.generation == {**checkpoints.GENERATION, "length_penalty": 1.0}
    assert loaded.tokenizer.get_vocab() == checkpoints.build_tokenizer().get_vocab()


@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_microsoft_layout_gives_the_same_logits(native_folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    native = load_checkpoint(native_folders[name])
    converted = load_checkpoint(write_microsoft(native_folders[name], tmp_path / "microsoft"))
    assert_same_weights(native, converted)
    assert torch.equal(logits(native), logits(converted))
    assert logits(native).std() > 0.5
    assert converted.source["layout"] == "microsoft"
    assert converted.generation == native.generation  # early_stopping of text_config, not of generation_config.json


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_becomes_float32(native_folders: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    kind = getattr(torch, dtype)
    loaded = load_checkpoint(write_microsoft(native_folders["tiny"], tmp_path / "half", dtype=kind))
    native = state(load_checkpoint(native_folders["tiny"]))
    assert loaded.source["dtype"] == dtype
    for name, tensor in state(loaded).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, native[name].to(kind).float()), name


def test_pickled_weights(microsoft: Path, native_folders: dict[str, Path]) -> None:
    torch.save(load_file(microsoft / "model.safetensors"), microsoft / "pytorch_model.bin")
    (microsoft / "model.safetensors").unlink()
    assert_same_weights(load_checkpoint(microsoft), load_checkpoint(native_folders["tiny"]))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded_weights(folder: Path, native_folders: dict[str, Path], suffix: str) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    whole = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    places = {name: f"part-{index % 3}.{suffix}" for index, name in enumerate(sorted(weights))}
    for shard in set(places.values()):
        part = {name: tensor for name, tensor in weights.items() if places[name] == shard}
        if suffix == "safetensors":
            save_file(part, folder / shard)
        else:
            torch.save(part, folder / shard)
    (folder / f"{whole}.index.json").write_text(json.dumps({"weight_map": places}))
    assert_same_weights(load_checkpoint(folder), load_checkpoint(native_folders["tiny"]))
    (folder / f"part-1.{suffix}").unlink()
    with pytest.raises(CheckpointError, match=rf"lacks part-1\.{suffix}"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "shard",
    [
        "../part.safetensors",
        "..",
        "",
        "parts/part.safetensors",
        "/etc/passwd",
        "..\\part.safetensors",
        "C:part",
        3,
        None,
    ],
)
def test_shards_of_other_folders_are_not_read(folder: Path, shard: object) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "part.safetensors")
    places = {**dict.fromkeys(weights, "part-1.safetensors"), min(weights): shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json names the shard .*in the same folder"):
        load_checkpoint(folder)


# ------------------------------------------------------------------------------------------------------- the embedding


@pytest.mark.parametrize("name", [HEAD, ENCODER_EMBEDDING, "model.language_model.decoder.embed_tokens.weight"])
def test_embedding_under_any_of_its_names(folder: Path, native_folders: dict[str, Path], name: str) -> None:
    edit_weights(folder, lambda weights: weights.update({name: weights.pop(SHARED)}))
    loaded = load_checkpoint(folder)
    assert_same_weights(loaded, load_checkpoint(native_folders["tiny"]))
    assert loaded.reference is loaded.model  # transformers would not find it


def test_no_embedding_at_all(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop(SHARED))
    with pytest.raises(CheckpointError, match=rf"lacks weights \(1\): {SHARED}"):
        load_checkpoint(folder)


def test_separate_output_layer(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({HEAD: weights[SHARED] + 1}))
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        load_checkpoint(folder)
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=False))
    loaded = load_checkpoint(folder)
    assert torch.equal(loaded.model.lm_head.weight, loaded.model.model.language_model.shared.weight + 1)
    with pytest.raises(CheckpointError, match=r"transformers ties them and ignores the head.*text_config too"):
        _ = loaded.reference
    edit_json(folder / "config.json", lambda config: config["text_config"].update(tie_word_embeddings=False))
    loaded = load_checkpoint(folder)
    assert torch.equal(loaded.reference.lm_head.weight, loaded.model.model.language_model.shared.weight + 1)


def test_two_input_embeddings(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({ENCODER_EMBEDDING: weights[SHARED] + 1}))
    with pytest.raises(CheckpointError, match="one embedding"):
        load_checkpoint(folder)


def test_logits_bias(microsoft: Path) -> None:
    edit_weights(microsoft, lambda weights: weights["language_model.final_logits_bias"].fill_(0.5))
    with pytest.raises(CheckpointError, match="final_logits_bias is not zero"):
        load_checkpoint(microsoft)


# ----------------------------------------------------------------------------------------------------- faulty weights


def test_missing_weights_are_named_as_the_file_names_them(microsoft: Path) -> None:
    name = "vision_tower.blocks.0.0.spatial_block.window_attn.fn.qkv.weight"
    edit_weights(microsoft, lambda weights: weights.pop(name))
    with pytest.raises(CheckpointError, match=rf"lacks weights \(1\): {name}"):
        load_checkpoint(microsoft)


def test_many_missing_weights_are_counted(folder: Path) -> None:
    def drop(weights: dict[str, Any]) -> None:
        for name in [name for name in weights if ".decoder.layers.1." in name]:
            del weights[name]

    edit_weights(folder, drop)
    with pytest.raises(
        CheckpointError, match=r"lacks weights \(26\): model\.language_model\.decoder\.layers\.1.* …$"
    ) as e:
        load_checkpoint(folder)
    assert str(e.value).count("layers.1") == 10


def test_unknown_weights(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"extra.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"unknown weights \(1\): extra\.weight"):
        load_checkpoint(folder)


def test_wrong_shape(microsoft: Path) -> None:
    edit_weights(microsoft, lambda weights: weights.update(image_projection=torch.zeros(3, 64)))
    with pytest.raises(CheckpointError, match=r"image_projection \[3, 64\] instead of \[64, 64\]"):
        load_checkpoint(microsoft)


def test_quantized_weights(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({SHARED: weights[SHARED].to(torch.int8)}))
    with pytest.raises(CheckpointError, match="int8 instead of a float type"):
        load_checkpoint(folder)


def test_vocabulary_of_another_size(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config["text_config"].update(vocab_size=2000))
    with pytest.raises(CheckpointError, match=r"wrong shape or type \(1\): model\.language_model\.shared\.weight"):
        load_checkpoint(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        load_checkpoint(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="LoRA"):
        load_checkpoint(folder)


def test_truncated_safetensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(folder)


def test_pickle_with_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "harmed",)

    (folder / "model.safetensors").unlink()
    torch.save({"weight": Harmful()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="more than tensors"):
        load_checkpoint(folder)
    assert not (tmp_path / "harmed").exists()


# ------------------------------------------------------------------------------------------------------ faulty configs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(model_type="bart"), "model_type is 'bart'"),
        (lambda config: config.pop("text_config"), "no text_config"),
        (lambda config: config.pop("vision_config"), "no vision_config"),
        (lambda config: config["text_config"].update(model_type="t5"), "'t5'"),
        (
            lambda config: config["text_config"].update(encoder_attention_heads=7),
            "no model can be built from config.json",
        ),
        (lambda config: config["vision_config"].update(projection_dim=32), "projection_dim 32 differs from d_model 64"),
        (lambda config: config["vision_config"].update(depths=[1, 1]), "no model can be built from config.json"),
    ],
)
def test_bad_native_config(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit_json(folder / "config.json", change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["vision_config"].update(image_feature_source=["last_frame"]), "image_feature_source"),
        (lambda config: config["vision_config"].update(image_pos_embed=None), "image_pos_embed"),
        (lambda config: config["vision_config"]["visual_temporal_embedding"].update(type="LEARNED"), "COSINE"),
        (lambda config: config["text_config"].update(normalize_before=True), "normalize_before"),
        (lambda config: config["text_config"].pop("d_model"), "text_config lacks d_model"),
    ],
)
def test_bad_microsoft_config(microsoft: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit_json(microsoft / "config.json", change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(microsoft)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        load_checkpoint(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="no folder"):
        load_checkpoint(tmp_path / "missing")


# --------------------------------------------------------------------------------------- generation and preprocessing


def test_a_native_generation_config_counts_alone(folder: Path) -> None:
    """As for transformers, which completes it from nowhere; what generate cannot start without is taken from config.json."""
    (folder / "generation_config.json").write_text(json.dumps({"num_beams": 5, "early_stopping": False}))
    edit_json(folder / "config.json", lambda config: config["text_config"].update(num_beams=2, no_repeat_ngram_size=4))
    loaded = load_checkpoint(folder)
    generation = loaded.generation
    assert generation["num_beams"] == 5
    assert generation["early_stopping"] is False
    assert generation["no_repeat_ngram_size"] == 0 == loaded.reference.generation_config.no_repeat_ngram_size
    assert generation["forced_eos_token_id"] is None
    assert [generation[name] for name in ("decoder_start_token_id", "bos_token_id", "eos_token_id")] == [2, 0, 2]
    assert "lacks decoder_start_token_id, eos_token_id" in loaded.notes[0]
    (folder / "generation_config.json").unlink()
    generation = load_checkpoint(folder).generation
    assert (generation["num_beams"], generation["no_repeat_ngram_size"], generation["forced_eos_token_id"]) == (2, 4, 2)


def test_preprocessing_from_processor_config(folder: Path) -> None:
    expected = load_checkpoint(folder).preprocessing
    values = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    assert load_checkpoint(folder).preprocessing == expected
    assert expected.image_size == (128, 128)
    assert expected.image_mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(size={"shortest_edge": 224}), "square"),
        (lambda values: values.update(size={"height": 64, "width": 96}), "square"),
        (lambda values: values.update(size={"height": 3200, "width": 3200}), "positions for 1 to 50"),
        (lambda values: values.pop("image_std"), "image_std"),
        (lambda values: values.update(do_normalize=False), "do_normalize"),
        (lambda values: values.update(resample=2), "resample is 2"),
        (lambda values: values.update(rescale_factor=1.0), r"rescale_factor is 1\.0"),
        (lambda values: values.update(do_center_crop=True, crop_size=64), "crop_size"),
    ],
)
def test_bad_preprocessing(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit_json(folder / "preprocessor_config.json", change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_no_preprocessing(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match="microsoft/Florence-2-base"):
        load_checkpoint(folder)


def test_image_tokens_of_the_real_sizes() -> None:
    config = transformers.Florence2Config()
    assert count_image_tokens(config, (768, 768)) == 577
    assert count_image_tokens(config, (1600, 1600)) == 2501
    with pytest.raises(CheckpointError):
        count_image_tokens(config, (1632, 1632))


# ----------------------------------------------------------------------------------------------------------- tokenizer


def test_missing_tokens_are_added_in_order(microsoft: Path) -> None:
    plain = checkpoints.plain_tokenizer()
    plain.enable_padding(length=40)
    plain.enable_truncation(4)
    plain.save(str(microsoft / "tokenizer.json"))
    tokenizer = load_checkpoint(microsoft).tokenizer
    first = plain.get_vocab_size()
    assert [tokenizer.token_to_id(token) for token in checkpoints.added_tokens()] == list(range(first, first + 1024))
    assert tokenizer.encode("a<loc_7> Where?").ids == checkpoints.build_tokenizer().encode("a<loc_7> Where?").ids


def test_bad_tokenizers(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())

    def refuse(change: Callable[[dict[str, Any]], object], message: str) -> None:
        spoilt = json.loads(json.dumps(content))
        change(spoilt)
        path.write_text(json.dumps(spoilt))
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(folder)

    def swap(values: dict[str, Any]) -> None:
        one, other = (token for token in values["added_tokens"] if token["content"] in ("<loc_5>", "<loc_6>"))
        one["content"], other["content"] = other["content"], one["content"]

    refuse(swap, "another order.*<loc_5>")
    refuse(lambda values: values["added_tokens"].pop(600), "lacks 1: <loc_")
    refuse(lambda values: values.update(post_processor=None), "does not wrap")
    refuse(lambda values: values.update(model={"type": "?"}), "cannot be read")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_checkpoint(folder)


def test_tokens_without_a_row(folder: Path) -> None:
    tokenizer = checkpoints.build_tokenizer()
    tokenizer.add_special_tokens(["<mine>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"1 tokens .* no row .*<mine>"):
        load_checkpoint(folder)


def test_extra_tokens_of_a_fine_tune_are_kept(native_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(native_folders["odd"], tmp_path / "odd"))  # its embedding has spare rows
    tokenizer = checkpoints.build_tokenizer()
    tokenizer.add_special_tokens(["<mine>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load_checkpoint(folder).tokenizer.token_to_id("<mine>") == checkpoints.num_tokens()


needs_real_tokenizer = pytest.mark.skipif(not TOKENIZER.is_dir(), reason=NO_SHARED)


@pytest.fixture
def real_plain(tmp_path: Path) -> Path:
    """Microsoft's tokenizer files without the added tokens: tokenizer.json, vocab.json and merges.txt."""
    content = json.loads((TOKENIZER / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < 50265]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return tmp_path


@needs_real_tokenizer
@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
def test_real_tokenizer_from_plain_files(real_plain: Path, form: str) -> None:
    if form == "vocab.json":
        (real_plain / "tokenizer.json").unlink()
    tokenizer = load_tokenizer(real_plain, 51289, TOKEN_IDS)
    expected = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    assert tokenizer.get_vocab() == expected.get_vocab()
    ids = {token: tokenizer.token_to_id(token) for token in ("<od>", "<loc_0>", "<loc_999>", "<poly>", "<and>")}
    assert ids == {"<od>": 50265, "<loc_0>": 50269, "<loc_999>": 51268, "<poly>": 51286, "<and>": 51288}
    texts = ["region <loc_52><loc_3>?", " Größe 中文 <mask> </s>x", "a\n b", "<and> <poly>", ""]
    for line in (TOKENIZER / "prompt_ids.jsonl").read_text().splitlines():
        texts += [value for value in json.loads(line) if isinstance(value, str)]
    for text in texts:
        assert tokenizer.encode(text).ids == expected.encode(text).ids, text
    decoded = tokenizer.decode([2, 0, 50269, 100, 200, 51286, 2], skip_special_tokens=False)
    assert decoded == expected.decode([2, 0, 50269, 100, 200, 51286, 2], skip_special_tokens=False)


@needs_real_tokenizer
def test_real_tokenizer_that_cannot_fit(real_plain: Path) -> None:
    with pytest.raises(CheckpointError, match="no row in the embedding of 51000 rows"):
        load_tokenizer(real_plain, 51000, TOKEN_IDS)
    content = json.loads((real_plain / "tokenizer.json").read_text())
    content["model"]["vocab"]["surplus"] = 50265
    (real_plain / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"<od> at 50266.* has it at 50265"):
        load_tokenizer(real_plain, 51328, TOKEN_IDS)


@needs_real_tokenizer
def test_added_tokens_file(real_plain: Path) -> None:
    (real_plain / "tokenizer.json").unlink()
    listed = {token: 50265 + index for index, token in enumerate((*ADDED_TOKENS, "<image>"))}
    (real_plain / "added_tokens.json").write_text(json.dumps(listed))
    assert load_tokenizer(real_plain, 51328, TOKEN_IDS).token_to_id("<image>") == 51289
    (real_plain / "added_tokens.json").write_text(json.dumps({"<od>": 50300}))
    with pytest.raises(CheckpointError, match="gap"):
        load_tokenizer(real_plain, 51328, TOKEN_IDS)


# ------------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub with the files of `folder`, and a subfolder with other formats."""
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    with LocalHub(folder, tmp_path / "cache", monkeypatch) as found:
        yield found


def test_hub_id(hub: LocalHub, native_folders: dict[str, Path]) -> None:
    (hub.folder / "pytorch_model.bin").write_bytes(b"never fetched")
    loaded = load_checkpoint("owner/model")
    assert_same_weights(loaded, load_checkpoint(native_folders["tiny"]))
    assert loaded.source["name"] == "owner/model"
    assert loaded.source["revision"] == COMMIT
    assert "model.safetensors" in hub.requested
    assert "pytorch_model.bin" not in hub.requested
    assert not any("/" in name for name in hub.requested)


def test_hub_id_with_pickled_weights(hub: LocalHub, native_folders: dict[str, Path]) -> None:
    torch.save(load_file(hub.folder / "model.safetensors"), hub.folder / "pytorch_model.bin")
    (hub.folder / "model.safetensors").unlink()
    assert_same_weights(load_checkpoint("owner/model", revision=COMMIT), load_checkpoint(native_folders["tiny"]))


@pytest.mark.parametrize(
    ("repo_id", "revision", "message"),
    [
        ("owner/missing", None, "no such repository on the hub.*hf auth login"),
        ("owner/gated", None, "licence"),
        ("owner/model", "nothing", "at revision nothing: the repository has no such revision"),
        ("owner/--bad--", None, "the download failed"),
    ],
)
def test_hub_refusals(hub: LocalHub, repo_id: str, revision: str | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(repo_id, revision=revision)


def test_hub_out_of_reach(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="cannot be reached and nothing is cached"):
        load_checkpoint("owner/model")
