"""Which generation settings of a checkpoint are obeyed, and that nothing is dropped on both sides of a verification."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("transformers", reason="needs the export extra")
from transformers import GenerationConfig  # noqa: E402

from export.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from export.checkpoints.generation import _WITHOUT_EFFECT  # noqa: E402
from export.verification import checks, reference  # noqa: E402
from florence_onnx import CheckpointError, Florence2, GenerationOptions, VerificationError, tasks  # noqa: E402
from florence_onnx.bundles import bundle  # noqa: E402
from tests import descriptions  # noqa: E402
from tests.conftest import Exported  # noqa: E402
from tests.export.conftest import edit_json  # noqa: E402

OBEYED: dict[str, Any] = {
    "suppress_tokens": [5, 6],
    "begin_suppress_tokens": [7],
    "bad_words_ids": [[9, 10]],
    "min_length": 5,
    "repetition_penalty": 1.2,
    "encoder_repetition_penalty": 1.2,
    "encoder_no_repeat_ngram_size": 2,
    "num_beam_groups": 3,
    "diversity_penalty": 0.5,
    "do_sample": True,
    "num_return_sequences": 2,
    "exponential_decay_length_penalty": [5, 1.1],
    "sequence_bias": [[[9], -3.0]],
    "renormalize_logits": True,
    "guidance_scale": 1.5,
    "penalty_alpha": 0.6,
    "force_words_ids": [[9]],
    "constraints": ["x"],
    "stop_strings": ["a"],
    "max_time": 5.0,
    "token_healing": True,
    "dola_layers": "high",
    "watermarking_config": {"greenlist_ratio": 0.3},
}
"""Values that change what `generate` answers; of what the runtime does not know, each is refused by its name."""

SAMPLING = {
    "temperature": 0.5,
    "top_k": 5,
    "top_p": 0.5,
    "min_p": 0.1,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
}
KNOWN = GenerationOptions.__dataclass_fields__.keys()


def set_generation(folder: Path, **values: Any) -> None:
    edit_json(folder / "generation_config.json", lambda config: config.update(values))


@pytest.mark.parametrize("name", list(OBEYED))
def test_a_setting_that_generate_obeys_is_exported_or_refused(folder: Path, microsoft: Path, name: str) -> None:
    set_generation(folder, **{name: OBEYED[name]})
    edit_json(microsoft / "config.json", lambda config: config["text_config"].update({name: OBEYED[name]}))
    for place, file in ((folder, "generation_config.json"), (microsoft, "config.json")):
        if name in KNOWN:
            assert load_checkpoint(place).generation[name] == OBEYED[name]
            continue
        with pytest.raises(CheckpointError, match=rf"{file} sets {name} = .*remove it from {file}"):
            load_checkpoint(place)


def test_every_setting_of_transformers_is_accounted_for() -> None:
    """A new one is a decision: obeyed and so tested above, or without effect."""
    ids = {"decoder_start_token_id", "bos_token_id", "pad_token_id", "eos_token_id"}
    always = {
        "num_beams",
        "no_repeat_ngram_size",
        "early_stopping",
        "length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
    }
    lengths = {"max_length", "max_new_tokens", "min_new_tokens"}
    known = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    assert known - ids - always - lengths - OBEYED.keys() - SAMPLING.keys() - _WITHOUT_EFFECT == set()


def test_sampling_settings_count_only_with_do_sample(folder: Path) -> None:
    set_generation(folder, **SAMPLING)
    generation = load_checkpoint(folder).generation
    assert generation.keys() & SAMPLING.keys() == SAMPLING.keys() & KNOWN
    set_generation(folder, do_sample=True)
    unknown = [name for name in ("do_sample", *SAMPLING) if name not in KNOWN]
    if unknown:
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(folder)
        assert all(f"{name} = " in str(error.value) for name in unknown)


def test_values_that_change_nothing_are_no_obstacle(folder: Path) -> None:
    before = load_checkpoint(folder).generation
    neutral = {
        "suppress_tokens": [],
        "guidance_scale": 1,
        "min_length": 0,
        "repetition_penalty": 1.0,
        "use_cache": False,
    }
    set_generation(folder, **neutral, encoder_no_repeat_ngram_size=0, do_sample=False, max_time=None, my_own_key=[1])
    found = load_checkpoint(folder)
    assert {name: found.generation[name] for name in before} == before
    assert found.notes == ()


def test_lengths_are_noted_and_not_inherited(folder: Path) -> None:
    set_generation(folder, max_length=77)
    notes = load_checkpoint(folder).notes
    assert len(notes) == 1 and "max_length 77" in notes[0] and "max_new_tokens" in notes[0]


@pytest.mark.parametrize("values", [{"early_stopping": "perhaps"}, {"num_return_sequences": 9, "num_beams": 2}])
def test_what_transformers_refuses_names_the_file(folder: Path, values: dict[str, Any]) -> None:
    set_generation(folder, **values)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: transformers refuses"):
        load_checkpoint(folder)


# -------------------------------------------------------------------------------------------------- end tokens


@pytest.mark.parametrize("place", ["generation_config.json", "config.json", "text_config", "microsoft"])
def test_lists_with_one_token_are_that_token(folder: Path, microsoft: Path, place: str) -> None:
    lists = {"eos_token_id": [2], "forced_eos_token_id": [2]}
    chosen = microsoft if place == "microsoft" else folder
    expected = load_checkpoint(chosen).generation
    if place == "generation_config.json":
        set_generation(folder, **lists)
    elif place == "config.json":
        edit_json(folder / "config.json", lambda config: config.update(eos_token_id=[2]))
    else:
        edit_json(chosen / "config.json", lambda config: config["text_config"].update(lists))
    assert load_checkpoint(chosen).generation == expected
    if place in ("config.json", "text_config"):
        (folder / "generation_config.json").unlink()
        assert load_checkpoint(chosen).generation["eos_token_id"] == 2


def test_several_end_tokens_are_read_or_refused_by_name(folder: Path) -> None:
    set_generation(folder, eos_token_id=[2, 77])
    try:
        found = load_checkpoint(folder)
    except CheckpointError as error:
        assert "generation_config.json" in str(error) and "eos_token_id = [2, 77]" in str(error)
        assert "a single token" in str(error)
    else:
        assert found.generation["eos_token_id"] == [2, 77]


def test_a_checkpoint_that_ends_at_a_list_is_verified(folder: Path, tiny: Exported) -> None:
    """As transformers' Trainer saves it: the bundle is that of the single token, and transformers gives its tokens for
    the list."""
    set_generation(folder, eos_token_id=[2], forced_eos_token_id=[2])
    edit_json(folder / "config.json", lambda config: config.update(eos_token_id=[2]))
    loaded, written = load_checkpoint(folder), bundle.read(tiny.bundle)
    assert bundle.generation_defaults(loaded.generation, written.sizes, folder) == written.generation
    assert loaded.reference.generation_config.eos_token_id == [2]
    for tokens in checks.check_tokens(loaded, written).values():
        assert tokens["equal"] == tokens["total"] > 0


# ------------------------------------------------------------------------------------- fine-tunes with other token ids


IDS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
"""What some eight fine-tunes on the hub say in generation_config.json."""


def test_other_ids_are_obeyed_in_the_native_layout_and_named(folder: Path, tiny: Exported, tmp_path: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({**IDS, "num_beams": 3}))
    loaded = load_checkpoint(folder)
    assert {name: loaded.generation[name] for name in IDS} == IDS
    assert loaded.generation["decoder_start_token_id"] == 2  # generate starts with bos_token_id where no other is named
    (note,) = loaded.notes
    assert "generation_config.json says bos_token_id 2 (</s>), pad_token_id 0 (<s>), eos_token_id 1 (<pad>)" in note
    assert loaded.reference.generation_config.eos_token_id == 1
    # the weights are those of the fixture: only what ends an answer differs, which the tokens of transformers' generate
    # decide
    copy = Path(shutil.copytree(tiny.bundle, tmp_path / "bundle"))
    (copy / bundle.GENERATION_CONFIG).write_text(json.dumps(loaded.generation))
    files = descriptions.read(copy)["files"]
    del files[bundle.GENERATION_CONFIG]
    descriptions.change(copy, files=files)
    found = checks.check_tokens(loaded, bundle.read(copy))
    assert all(tokens["equal"] == tokens["total"] > 0 for tokens in found.values())
    with pytest.raises(VerificationError, match="gives other tokens than transformers"):
        checks.check_tokens(loaded, bundle.read(tiny.bundle))  # where they are dropped, it shows


def test_other_ids_are_ignored_in_microsofts_layout_and_named(microsoft: Path) -> None:
    expected = load_checkpoint(microsoft).generation
    (microsoft / "generation_config.json").write_text(json.dumps(IDS))
    loaded = load_checkpoint(microsoft)
    assert loaded.generation == expected
    (note,) = loaded.notes
    assert "says bos_token_id 2, pad_token_id 0, eos_token_id 1; Microsoft's class never reads that file" in note


# ----------------------------------------------------------------------------------------------- the reference


def test_a_setting_lost_on_the_way_is_not_reported_as_verified(folder: Path, tiny: Exported) -> None:
    """The reference obeys the folder, whatever was exported."""
    set_generation(folder, suppress_tokens=list(range(3, 700)))
    edit_json(folder / "generation_config.json", lambda config: config.pop("suppress_tokens"))
    loaded = load_checkpoint(folder)
    set_generation(folder, suppress_tokens=list(range(3, 700)))
    with pytest.raises(VerificationError, match="gives other tokens than transformers"):
        checks.check_tokens(loaded, bundle.read(tiny.bundle))


def test_the_reference_is_loaded_by_transformers(folder: Path) -> None:
    loaded = load_checkpoint(folder)
    assert loaded.reference is not loaded.model
    ours, theirs = (dict(model.named_parameters()) for model in (loaded.model, loaded.reference))
    assert all(theirs[name].data_ptr() == ours[name].data_ptr() for name in theirs), "one copy of the weights in memory"
    other = load_checkpoint(folder)
    with torch.no_grad():
        other.model.lm_head.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match="is not what transformers' from_pretrained reads"):
        _ = other.reference


def test_options_of_a_call_overrule_the_checkpoint(tiny: Exported, photographs: list[Any]) -> None:
    model = Florence2.from_pretrained(tiny.bundle, device="cpu")
    options = GenerationOptions(num_beams=2, forced_bos_token_id=-1, max_new_tokens=8)
    answer = model.run(tasks.OCR, photographs[0], options=options)
    sizes = bundle.read(tiny.bundle).sizes
    from florence_onnx.images import preprocessing

    pixels = preprocessing.preprocess(photographs[0], size=sizes.image_size, mean=sizes.image_mean, std=sizes.image_std)
    assert reference.generate(tiny.checkpoint, pixels, [tasks.OCR.format_prompt()], options) == [answer.token_ids]
