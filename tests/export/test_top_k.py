"""The decoder with top-k outputs: its nodes, its outputs against numpy's, and that it adds no weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from florence_onnx.bundles import bundle
from florence_onnx.runtime.engine import OnnxEngine
from florence_onnx.runtime.load_options import LoadOptions
from tests.conftest import NO_TORCH, Exported

torch = pytest.importorskip("torch", reason=NO_TORCH)
onnx = pytest.importorskip("onnx", reason=NO_TORCH)
from export.graphs.plans import plans  # noqa: E402
from export.graphs.top_k import NUM_TOP, add_top_k  # noqa: E402


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8"])
def exported(request: pytest.FixtureRequest, export_of: Callable[[str, str], Exported]) -> Exported:
    return export_of("tiny", request.param)


def graph(exported: Exported, name: str) -> onnx.GraphProto:
    return onnx.load(str(exported.bundle / name), load_external_data=False).graph


def external(weights: onnx.GraphProto) -> dict[str, dict[str, str]]:
    """The place of each weight in external data."""
    return {
        tensor.name: {item.key: item.value for item in tensor.external_data}
        for tensor in weights.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }


def test_it_is_the_decoder_and_six_nodes_of_plain_onnx(exported: Exported) -> None:
    plain, top = graph(exported, bundle.DECODER), graph(exported, bundle.DECODER_TOP)
    added = list(top.node)[len(plain.node) :]
    assert [node.op_type for node in added] == ["TopK", "Slice", "Sub", "Exp", "ReduceSum", "Log"]
    assert {node.domain for node in added} == {""}
    assert list(top.node)[: len(plain.node)] == list(plain.node)
    assert list(top.input) == list(plain.input)
    names = [output.name for output in top.output]
    assert names == [*(output.name for output in plain.output), bundle.TOP_VALUES, bundle.TOP_IDS, bundle.LOG_SUMS]


def test_it_adds_no_weight(exported: Exported) -> None:
    plain, top = graph(exported, bundle.DECODER), graph(exported, bundle.DECODER_TOP)
    assert external(top) == external(plain) != {}
    assert {place["location"] for place in external(top).values()} == {bundle.WEIGHTS}
    before = {tensor.name for tensor in plain.initializer}
    added = [tensor for tensor in top.initializer if tensor.name not in before]
    assert sum(tensor.ByteSize() for tensor in added) < 200
    sizes = [(exported.bundle / name).stat().st_size for name in (bundle.DECODER, bundle.DECODER_TOP)]
    assert 0 < sizes[1] - sizes[0] < 2000


def test_its_outputs_are_those_of_a_sort(exported: Exported) -> None:
    decoder = next(plan for plan in plans(exported.checkpoint) if plan.name == bundle.DECODER)
    plain, top = (
        OnnxEngine(exported.bundle / name, LoadOptions("cpu")) for name in (bundle.DECODER, bundle.DECODER_TOP)
    )
    for tensors in (decoder.inputs, *decoder.check_inputs):
        feeds = {name: value.numpy() for name, value in tensors.items()}
        found = top.run(feeds)
        for name, value in plain.run(feeds).items():
            np.testing.assert_array_equal(found[name], value)
        check_outputs(found, top.output_shapes)


def check_outputs(found: dict[str, np.ndarray], shapes: dict[str, list[int | str]]) -> None:
    logits = found["logits"]
    count = min(NUM_TOP, logits.shape[-1])
    order = np.argsort(-logits, axis=-1, kind="stable")[..., :count]
    np.testing.assert_array_equal(found[bundle.TOP_IDS], order)
    np.testing.assert_array_equal(found[bundle.TOP_VALUES], np.take_along_axis(logits, order, axis=-1))
    exact = np.log(np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)).sum(axis=-1))
    np.testing.assert_allclose(found[bundle.LOG_SUMS], exact, rtol=1e-5, atol=1e-6)
    kinds = [found[name].dtype for name in (bundle.TOP_VALUES, bundle.TOP_IDS, bundle.LOG_SUMS, "logits")]
    assert kinds == [np.float32, np.int64, np.float32, np.float32]
    assert shapes[bundle.TOP_IDS] == ["prompts", "length", count]


@pytest.mark.parametrize("vocabulary", [5, NUM_TOP, 50])
def test_equal_logits_come_by_token_and_a_short_vocabulary_comes_whole(tmp_path: Path, vocabulary: int) -> None:
    value = onnx.helper.make_tensor_value_info
    shape = ["prompts", "length", vocabulary]
    bare = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["logits"])],
        "bare",
        [value("x", onnx.TensorProto.FLOAT, shape)],
        [value("logits", onnx.TensorProto.FLOAT, shape)],
    )
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(bare, opset_imports=[opset], ir_version=9), str(tmp_path / "bare.onnx"))
    add_top_k(tmp_path / "bare.onnx", tmp_path / "top.onnx")
    loaded = OnnxEngine(tmp_path / "top.onnx", LoadOptions("cpu"))
    logits = np.random.default_rng(0).integers(-3, 4, (2, 3, vocabulary)).astype(np.float32)
    logits[0, 0] *= 1000  # exp of these overflows
    check_outputs(loaded.run({"x": logits}), loaded.output_shapes)
