"""Reading bundles: which damage is detected, what the errors say, and how names are resolved."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from florence_onnx import (
    BundleFileMissingError,
    BundleFormatError,
    BundleNotFoundError,
    CorruptGraphError,
    Florence2,
    InputError,
    MissingExtraError,
    ProviderError,
)
from florence_onnx.bundles import bundle, hub
from florence_onnx.bundles.configuration import configure
from florence_onnx.runtime import providers
from tests import descriptions

DEMO = bundle.DEMO_DIRECTORY
SAMPLE = DEMO.parent / "samples" / "scene-1.png"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the demo bundle that a test may damage."""
    return Path(shutil.copytree(DEMO, tmp_path / "bundle"))


def change_generation(path: Path, **changes: object) -> None:
    config = json.loads((path / bundle.GENERATION_CONFIG).read_text())
    (path / bundle.GENERATION_CONFIG).write_text(json.dumps({**config, **changes}))
    forget_hashes(path)


def forget_hashes(path: Path) -> None:
    """Removes the recorded hashes, so that damage reaches the checks behind them."""
    descriptions.change(path, files={})


@pytest.mark.parametrize("name", [*bundle.GRAPHS, bundle.WEIGHTS, bundle.TOKENIZER, bundle.GENERATION_CONFIG])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(BundleFileMissingError, match=name) as caught:
        Florence2.from_pretrained(copy)
    assert isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize("name", [*bundle.GRAPHS, bundle.WEIGHTS])
def test_a_shortened_file_is_named(copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptGraphError, match=rf"{name} has \d+ bytes instead of {len(content)}"):
        Florence2.from_pretrained(copy)


@pytest.mark.parametrize("name", bundle.GRAPHS)
def test_a_graph_of_the_right_length_with_wrong_content_is_named(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[:4000] = bytes(4000)
    (copy / name).write_bytes(content)
    with pytest.raises(CorruptGraphError, match=rf"{name} is damaged"):
        Florence2.from_pretrained(copy)
    forget_hashes(copy)
    # a model with continuous batching loads decoder_top.onnx, one without loads decoder.onnx
    max_batch = 1 if name == bundle.DECODER_TOP else None
    with pytest.raises(CorruptGraphError, match=rf"{name} does not load") as caught:
        Florence2.from_pretrained(copy, device="cpu", max_batch=max_batch)
    assert isinstance(caught.value, ValueError)


def test_a_newer_format_asks_for_an_upgrade(copy: Path) -> None:
    descriptions.change(copy, format_version=bundle.FORMAT_VERSION + 1)
    with pytest.raises(BundleFormatError, match="pip install --upgrade florence-onnx"):
        Florence2.from_pretrained(copy)


def test_an_older_format_asks_for_another_export(copy: Path) -> None:
    descriptions.change(copy, format_version=bundle.FORMAT_VERSION - 1)
    with pytest.raises(BundleFormatError, match=r"has format version 2.*export it again: florence-onnx-export"):
        Florence2.from_pretrained(copy)


@pytest.mark.parametrize("version", [None, True, "2", 2.5, 0])
def test_a_malformed_format_version_is_refused(copy: Path, version: object) -> None:
    descriptions.change(copy, format_version=version)
    with pytest.raises(BundleFormatError, match="has format version"):
        bundle.read(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "\ufeff{}x"])
def test_an_unreadable_description_is_refused(copy: Path, text: str) -> None:
    (copy / bundle.DESCRIPTION).write_text(text)
    with pytest.raises(BundleFormatError, match=bundle.DESCRIPTION):
        bundle.read(copy)


@pytest.mark.parametrize("model", [None, {}, {"image_size": [768, 768]}, {"unknown": 1}])
def test_an_incomplete_description_is_refused(copy: Path, model: object) -> None:
    descriptions.change(copy, model=model)
    with pytest.raises(BundleFormatError, match="incomplete"):
        bundle.read(copy)


@pytest.mark.parametrize("files", [None, [], {"decoder.onnx": 3}, {"decoder.onnx": {}}])
def test_a_damaged_list_of_files_is_refused(copy: Path, files: object) -> None:
    descriptions.change(copy, files=files)
    with pytest.raises(BundleFormatError, match="incomplete"):
        bundle.read(copy)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_size", "128"),
        ("image_size", [128]),
        ("image_mean", [0.5, 0.5, "x"]),
        ("decoder_layers", 0),
        ("vocab_size", 1.5),
        ("decoder_heads", None),
    ],
)
def test_an_invalid_size_is_named(copy: Path, name: str, value: object) -> None:
    descriptions.change_model(copy, **{name: value})
    with pytest.raises(BundleFormatError, match=name):
        bundle.read(copy)


def test_a_wrong_number_of_layers_is_detected_at_load(copy: Path) -> None:
    descriptions.change_model(copy, decoder_layers=99)
    with pytest.raises(BundleFormatError, match="the decoder has 3 layers, its description says 99"):
        Florence2.from_pretrained(copy)


def test_damaged_weights_of_the_right_size_are_detected(copy: Path) -> None:
    weights = copy / bundle.WEIGHTS
    content = bytearray(weights.read_bytes())
    content[1_000_000] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CorruptGraphError, match=r"weights\.data is damaged"):
        Florence2.from_pretrained(copy)


@pytest.mark.parametrize(
    "changes", [{"eos_token_id": []}, {"eos_token_id": [2, 10**6]}, {"num_beams": 0}, {"forced_eos_token_id": 10**6}]
)
def test_invalid_generation_defaults_are_refused(copy: Path, changes: dict[str, Any]) -> None:
    change_generation(copy, **changes)
    with pytest.raises(BundleFormatError, match=bundle.GENERATION_CONFIG):
        bundle.read(copy)


def test_lists_of_one_token_id_are_read_as_transformers_does(copy: Path) -> None:
    change_generation(copy, eos_token_id=[2], forced_eos_token_id=[2])
    assert bundle.read(copy).generation.options.forced_eos_token_id == 2


def test_a_broken_tokenizer_is_named(copy: Path) -> None:
    (copy / bundle.TOKENIZER).write_text("{}")
    forget_hashes(copy)
    with pytest.raises(BundleFormatError, match="tokenizer"):
        Florence2.from_pretrained(copy)


def test_another_precision_than_the_bundle_has_is_refused(copy: Path) -> None:
    with pytest.raises(BundleFormatError, match="--precision int8"):
        Florence2.from_pretrained(copy, precision="int8")


@pytest.mark.parametrize("name", ["no/such/place", "nowhere", "./owner/name", ""])
def test_an_unknown_name_is_refused_with_the_forms_of_names(name: str) -> None:
    with pytest.raises(BundleNotFoundError, match="directory"):
        hub.resolve(name)


def test_for_a_checkpoint_the_error_has_the_export_command(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(BundleNotFoundError, match="florence-onnx-export"):
        hub.resolve(tmp_path)


def test_an_unavailable_provider_is_an_error_with_the_install_line() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider compiled in")
    with pytest.raises(ProviderError, match=r"CUDAExecutionProvider is not in .* pip install 'florence-onnx\[gpu\]'"):
        Florence2.from_pretrained("demo", device="cuda")
    with pytest.raises(ProviderError, match="NoSuchProvider"):
        Florence2.from_pretrained("demo", providers=["NoSuchProvider"])
    with pytest.raises(InputError, match="unknown device 'gpu'"):
        Florence2.from_pretrained("demo", device="gpu")


def test_session_options_reach_onnxruntime() -> None:
    model = Florence2.from_pretrained("demo", device="cpu", session_options={"intra_op_num_threads": 1})
    assert model._vision_encoder._session.get_session_options().intra_op_num_threads == 1  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="no attribute 'threads'"):
        Florence2.from_pretrained("demo", session_options={"threads": 1})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"providers": []}, "providers must be a list"),
        ({"providers": "CPUExecutionProvider"}, "providers must be a list"),
        ({"providers": [None]}, "a provider is a name"),
        ({"session_options": {"intra_op_num_threads": "x"}}, "intra_op_num_threads cannot be 'x'"),
        ({"session_options": {"add_session_config_entry": 1}}, "no attribute"),
        ({"session_options": 3}, "session_options must be a dict"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Florence2.from_pretrained("demo", device="cpu", **arguments)


def test_device_auto_falls_back_when_an_accelerator_does_not_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import onnxruntime

    start = onnxruntime.InferenceSession

    def no_gpu(path: str, options: Any, providers: list[Any], **rest: Any) -> Any:
        if providers[0][0] != "CPUExecutionProvider":
            raise RuntimeError("CUDA_PATH is set but CUDA wasnt able to be loaded")
        return start(path, options, providers=providers, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", no_gpu)
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    assert Florence2.from_pretrained("demo").info()["provider"] == "CPUExecutionProvider"
    assert "cuda is installed but cannot run" in caplog.text
    with pytest.raises(ProviderError, match=r"CUDAExecutionProvider could not load vision_encoder\.onnx"):
        Florence2.from_pretrained("demo", device="cuda")


def test_device_auto_prefers_accelerators_and_falls_back_to_the_cpu() -> None:
    available = ["OpenVINOExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    assert providers.candidates(available) == ["cuda", "openvino", "cpu"]
    assert providers.candidates(["CPUExecutionProvider"]) == ["cpu"]
    assert providers.candidates(available, "bf16") == ["openvino"]


def test_provider_options_are_kept() -> None:
    given = [("CUDAExecutionProvider", {"device_id": 1}), "CPUExecutionProvider"]
    resolved = providers.resolve("auto", given, ["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert resolved == [("CUDAExecutionProvider", {"device_id": 1}), ("CPUExecutionProvider", {})]


def test_without_onnxruntime_the_error_has_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        MissingExtraError, match=r"onnxruntime is not installed; run: pip install 'florence-onnx\[cpu\]'"
    ) as caught:
        Florence2.from_pretrained("demo", device="cpu")
    assert isinstance(caught.value, ImportError)


def test_without_torch_the_export_prints_the_install_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import export.__main__ as entry

    for name in [name for name in sys.modules if name.startswith("export.") and name != "export.__main__"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("export.commands.export", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit) as caught:
        entry.main()
    assert caught.value.code == 2
    assert "pip install 'florence-onnx[export]'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- generation settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_beam_groups": 3}, "num_beam_groups=3 is not possible"),
        ({"force_words_ids": [[5]]}, "force_words_ids"),
        ({"penalty_alpha": 0.6}, "penalty_alpha"),
        ({"repetition_penalty": "high"}, "repetition_penalty must be a number"),
        ({"suppress_tokens": [10**7]}, "suppress_tokens"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_generation_settings_that_cannot_be_obeyed_are_refused_by_name(
    copy: Path, changes: dict[str, Any], said: str
) -> None:
    change_generation(copy, **changes)
    with pytest.raises(BundleFormatError, match=f"{bundle.GENERATION_CONFIG}: .*{said}"):
        bundle.read(copy)


def test_generation_settings_of_a_checkpoint_are_obeyed(copy: Path) -> None:
    settings = {
        "eos_token_id": [2, 7],
        "suppress_tokens": [5],
        "begin_suppress_tokens": [6],
        "bad_words_ids": [[8], [9, 10]],
        "min_length": 4,
        "repetition_penalty": 1.2,
        "sequence_bias": [[[5], -1.0]],
        "exponential_decay_length_penalty": [20, 1.1],
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "num_return_sequences": 2,
        "max_length": 20,
        "use_cache": False,
        "num_beam_groups": 1,
        "diversity_penalty": 0.0,
        "something_of_a_trainer": 3,
    }
    change_generation(copy, **settings)
    config = bundle.read(copy).generation.resolve(None)
    assert config.end_tokens == (2, 7) and config.suppress_tokens == (5,) and config.begin_suppress_tokens == (6,)
    assert config.bad_words_ids == ((8,), (9, 10)) and config.min_new_tokens == 3 and config.repetition_penalty == 1.2
    assert config.sequence_bias == (((5,), -1.0),) and config.exponential_decay_length_penalty == (20, 1.1)
    assert config.do_sample and (config.temperature, config.top_p, config.top_k) == (0.5, 0.9, 50)
    assert config.num_return_sequences == 2 and config.max_length > 21


def test_configured_options_are_defaults_until_they_are_removed(copy: Path) -> None:
    before = {name: (copy / name).read_bytes() for name in (bundle.DESCRIPTION, bundle.GENERATION_CONFIG)}
    assert configure(copy, {"num_beams": 1, "max_new_tokens": 5}) == {"num_beams": 1, "max_new_tokens": 5}
    assert configure(copy, {"suppress_tokens": [5]})["max_new_tokens"] == 5
    config = bundle.read(copy).generation.resolve(None)
    assert (config.num_beams, config.max_length, config.suppress_tokens) == (1, 6, (5,))
    assert len(Florence2.from_pretrained(copy, device="cpu").run("<CAPTION>", SAMPLE).token_ids) == 6
    assert configure(copy, {"num_beams": None, "suppress_tokens": None}) == {"max_new_tokens": 5}
    assert bundle.read(copy).generation.resolve(None).num_beams == 3
    assert configure(copy, {"max_new_tokens": None}) == {}
    assert not (copy / bundle.CONFIGURED).exists() and not list(copy.glob(".*"))
    assert before == {name: (copy / name).read_bytes() for name in before}, "engines must not be built anew"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_beams": 0}, "num_beams must be a whole number"),
        ({"num_beems": 1}, "no option 'num_beems'; did you mean num_beams"),
        ({"num_beems": None}, "no option 'num_beems'"),
        ({"num_beam_groups": 2}, "diverse beam search"),
        ({"num_return_sequences": 9}, "raise num_beams"),
    ],
)
def test_a_wrong_configuration_changes_nothing(copy: Path, changes: dict[str, Any], said: str) -> None:
    configure(copy, {"max_new_tokens": 5})
    with pytest.raises(BundleFormatError, match=said):
        configure(copy, {"max_new_tokens": 7, **changes})
    assert configure(copy, {}) == {"max_new_tokens": 5}


def test_what_cannot_be_configured_says_why(tmp_path: Path, copy: Path) -> None:
    for name in ("demo", DEMO):
        with pytest.raises(InputError, match="built-in demo cannot be configured"):
            configure(name, {"num_beams": 1})
    with pytest.raises(BundleNotFoundError, match="not a directory"):
        configure(tmp_path / "none", {})
    (copy / bundle.CONFIGURED).write_text('{"num_beams": "x"}')
    with pytest.raises(BundleFormatError, match=rf"{bundle.CONFIGURED}: num_beams"):
        bundle.read(copy)
    (copy / bundle.CONFIGURED).unlink()
    several = tmp_path / "several"
    for precision in ("fp32", "int8"):
        shutil.copytree(copy, several / precision)
    descriptions.change(several / "int8", precision="int8")
    descriptions.change(several / "fp32", precision="fp32")
    configure(several, {"num_beams": 2})
    configure(several, {"num_beams": 1}, "int8")
    found = {name: bundle.read(several, name).generation.resolve(None).num_beams for name in ("fp32", "int8")}
    assert found == {"fp32": 2, "int8": 1}
