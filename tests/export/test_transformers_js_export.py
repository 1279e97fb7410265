"""The transformers.js layout: names, types, every weight stored once, and fp16 files that a plain CPU session runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
onnx = pytest.importorskip("onnx", reason="needs the export extra")

import onnxruntime  # noqa: E402

from export.checkpoints.checkpoint import Checkpoint  # noqa: E402
from export.graphs.exporter import export_graph  # noqa: E402
from export.transformers_js.writer import export_transformers_js  # noqa: E402
from florence_onnx import Florence2  # noqa: E402
from florence_onnx.bundles import bundle, precisions  # noqa: E402
from florence_onnx.bundles.own_tasks import gather  # noqa: E402
from florence_onnx.errors import CheckpointError, VerificationError  # noqa: E402
from tests import exported_bundles  # noqa: E402
from tests.conftest import Exported  # noqa: E402

LAYERS, HEADS, HEAD_SIZE = 2, 4, 16
INPUTS = {
    "vision_encoder": ["pixel_values"],
    "embed_tokens": ["input_ids"],
    "encoder_model": ["attention_mask", "inputs_embeds"],
    "decoder_model_merged": [
        "encoder_attention_mask",
        "encoder_hidden_states",
        "inputs_embeds",
        *(
            f"past_key_values.{i}.{p}.{k}"
            for i in range(LAYERS)
            for p in ("decoder", "encoder")
            for k in ("key", "value")
        ),
        "use_cache_branch",
    ],
}
OUTPUTS = {
    "vision_encoder": ["image_features"],
    "embed_tokens": ["inputs_embeds"],
    "encoder_model": ["last_hidden_state"],
    "decoder_model_merged": [
        "logits",
        *(f"present.{i}.{p}.{k}" for i in range(LAYERS) for p in ("decoder", "encoder") for k in ("key", "value")),
    ],
}
INTEGERS = {"input_ids", "attention_mask", "encoder_attention_mask"}


@pytest.fixture(scope="module")
def checkpoint(tiny: Exported) -> Checkpoint:
    return tiny.checkpoint


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def exported(
    request: pytest.FixtureRequest, export_of: Callable[[str, str], Exported]
) -> tuple[str, Path, dict[str, Any]]:
    """Precision, directory, and the result of the export's own verification."""
    output = export_of("tiny", f"transformers-js-{request.param}").bundle
    assert any("decoder_model_merged" in step for step in exported_bundles.steps(output))
    return request.param, output, dict(bundle.read(output, request.param).verification)


def session(directory: Path, name: str, precision: str) -> onnxruntime.InferenceSession:
    """With ONNX Runtime's default options: all optimizations on."""
    path = directory / "onnx" / f"{name}{precisions.JS_SUFFIXES[precision]}.onnx"
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_files(exported: tuple[str, Path, dict[str, Any]]) -> None:
    precision, directory, report = exported
    suffix = precisions.JS_SUFFIXES[precision]
    assert {path.name for path in (directory / "onnx").iterdir()} == {f"{name}{suffix}.onnx" for name in INPUTS}
    assert {path.name for path in directory.iterdir()} == {
        "config.json",
        "generation_config.json",
        "onnx",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        bundle.JS_VERIFICATION,
    }
    assert report["graphs"].keys() == {f"{name}{suffix}.onnx" for name in INPUTS}
    if precision == "fp32":
        assert all(search["equal"] == search["total"] > 0 for search in report["tokens"].values())


@pytest.mark.parametrize("name", INPUTS)
def test_interface(exported: tuple[str, Path, dict[str, Any]], name: str) -> None:
    precision, directory, _ = exported
    graph = session(directory, name, precision)
    assert sorted(node.name for node in graph.get_inputs()) == sorted(INPUTS[name])
    assert [node.name for node in graph.get_outputs()] == OUTPUTS[name]
    for node in (*graph.get_inputs(), *graph.get_outputs()):
        expected = "int64" if node.name in INTEGERS else "bool" if node.name == "use_cache_branch" else "float"
        assert node.type == f"tensor({expected})", node.name
        if node.name != "use_cache_branch":
            assert node.shape[0] == "batch_size", node.name
        if node.name.startswith("past_key_values"):
            assert (node.shape[1], node.shape[3]) == (HEADS, HEAD_SIZE)


def test_no_weight_is_stored_twice(exported: tuple[str, Path, dict[str, Any]]) -> None:
    _, directory, _ = exported
    for path in (directory / "onnx").iterdir():
        seen: dict[bytes, str] = {}
        for tensor in all_tensors(onnx.load(str(path)).graph):
            array = onnx.numpy_helper.to_array(tensor)
            if array.nbytes < 1024:
                continue
            for variant in {np.ascontiguousarray(array).tobytes(), np.ascontiguousarray(array.T).tobytes()}:
                assert variant not in seen, f"{path.name}: {tensor.name} is {seen[variant]}"
                seen[variant] = tensor.name


def all_tensors(graph: Any) -> Any:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("g"):
                yield from all_tensors(attribute.g)


def test_nothing_of_this_machine_is_inside(exported: tuple[str, Path, dict[str, Any]]) -> None:
    _, directory, _ = exported
    for path in directory.rglob("*.*"):
        content = path.read_bytes()
        for trace in (b"site-packages", b".py", str(directory.parent).encode(), str(Path.home()).encode() + b"/"):
            assert trace not in content, f"{path.name} holds {trace!r}"


def test_fp16_is_half_the_size(checkpoint: Checkpoint, exported: tuple[str, Path, dict[str, Any]]) -> None:
    precision, directory, _ = exported
    size = (directory / "onnx" / f"embed_tokens{precisions.JS_SUFFIXES[precision]}.onnx").stat().st_size
    weights = checkpoint.model.model.language_model.shared.weight.numel()
    assert size == pytest.approx(weights * (4 if precision == "fp32" else 2), rel=0.02)


def test_decoder_as_transformers_js_drives_it(
    checkpoint: Checkpoint, exported: tuple[str, Path, dict[str, Any]]
) -> None:
    """Calls the decoder with an empty cache, and then token by token, with the cross KV of the first call."""
    precision, directory, _ = exported
    graph = session(directory, "decoder_model_merged", precision)
    rows, length = 3, 21
    embeds = torch.randn(rows, 4, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1, 15:] = 0
    hidden = torch.randn(rows, length, 64, generator=torch.Generator().manual_seed(1))
    fixed = {"encoder_attention_mask": mask.numpy(), "encoder_hidden_states": hidden.numpy()}
    past = {
        name: np.zeros((rows, HEADS, 0, HEAD_SIZE), np.float32)
        for name in INPUTS["decoder_model_merged"]
        if name.startswith("past_key_values")
    }
    found = []
    for step in range(4):
        flag = np.array([step > 0])
        feeds = {**fixed, **past, "inputs_embeds": embeds[:, step : step + 1].numpy(), "use_cache_branch": flag}
        outputs = dict(zip(OUTPUTS["decoder_model_merged"], graph.run(None, feeds), strict=True))
        found.append(outputs["logits"])
        for name in past:
            if step == 0 or ".decoder." in name:
                past[name] = outputs[name.replace("past_key_values", "present")]
    model = checkpoint.model
    with torch.inference_mode():
        states = model.model.language_model.decoder(
            inputs_embeds=embeds, encoder_hidden_states=hidden, encoder_attention_mask=mask
        ).last_hidden_state
        expected = model.lm_head(states).numpy()
    tolerance = 1e-4 if precision == "fp32" else 0.2
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=tolerance)


def test_configs_hold_what_transformers_js_reads(exported: tuple[str, Path, dict[str, Any]]) -> None:
    _, directory, _ = exported
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "florence2"
    assert config["is_encoder_decoder"] is True
    assert config["text_config"]["model_type"] == "florence2_language"
    assert config["text_config"]["decoder_layers"] == LAYERS
    pixels = json.loads((directory / "preprocessor_config.json").read_text())
    assert pixels["processor_class"] == "Florence2Processor"
    assert pixels["size"] == {"height": 128, "width": 128}
    assert pixels["tasks_answer_post_processing_type"]["<OD>"] == "description_with_bboxes"
    assert len(pixels["tasks_answer_post_processing_type"]) == 15
    assert pixels["task_prompts_without_inputs"]["<OCR>"] == "What is the text in the image?"
    assert pixels["task_prompts_with_input"]["<REGION_TO_OCR>"] == "What text is in the region {input}?"
    assert json.loads((directory / "generation_config.json").read_text())["no_repeat_ngram_size"] == 3


def test_refusals(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="fp32 or fp16, not 'int3'"):
        export_transformers_js(checkpoint, tmp_path / "new", precision="int3")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="exists"):
        export_transformers_js(checkpoint, tmp_path)
    assert not (tmp_path / "new").exists()


# -------------------------------------------------------------------------------------------------- the shared exporter


class Shifting(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Adds a number that tracing turns into a constant, so that the graph is right for the traced length only."""

    def forward(self, values: Any) -> Any:
        return values + float(values.shape[1])


class Tied(torch.nn.Module):  # type: ignore[misc, name-defined]
    """One weight as embedding and as language model head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(300, 32)

    def forward(self, ids: Any) -> Any:
        return torch.nn.functional.linear(self.table(ids), self.table.weight)


def test_export_is_checked_at_other_sizes(tmp_path: Path) -> None:
    axes = {"values": {1: "length"}, "result": {1: "length"}}
    with pytest.raises(VerificationError, match=r"shifting\.onnx"):
        export_graph(
            Shifting(),
            tmp_path / "shifting.onnx",
            inputs={"values": torch.ones(2, 3)},
            outputs=["result"],
            dynamic_axes=axes,
            opset=18,
        )


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    path = tmp_path / "tied.onnx"
    report = export_graph(
        Tied(),
        path,
        inputs={"ids": torch.arange(6).reshape(2, 3)},
        outputs=["logits"],
        dynamic_axes={"ids": {0: "batch_size", 1: "length"}, "logits": {0: "batch_size", 1: "length"}},
        opset=18,
    )
    assert report.max_abs < 1e-5
    assert path.stat().st_size < 300 * 32 * 4 * 1.1


def test_weights_beyond_the_limit_of_protobuf_lie_beside_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.graphs.files._MAX_PROTOBUF_BYTES", 1000)
    test_tied_weights_are_stored_once(tmp_path)
    assert (tmp_path / "tied.onnx_data").stat().st_size == pytest.approx(300 * 32 * 4, rel=0.1)


def test_this_layout_carries_tasks_too(checkpoint: Checkpoint, tmp_path: Path) -> None:
    known = gather(["docvqa"])
    written = export_transformers_js(checkpoint, tmp_path / "out", tasks=known)
    assert written.tasks == known
    answer = Florence2.from_bundle(written).run("docvqa", np.zeros((40, 40, 3), np.uint8), text_input="What is it?")
    assert isinstance(answer.results, str) and answer.task.token == "<DocVQA>"
