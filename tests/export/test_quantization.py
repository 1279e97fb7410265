"""int8 and int4: the nodes of the graphs, their errors, and directories with several precisions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from florence_onnx import BundleFormatError, CheckpointError, Florence2, VerificationError
from florence_onnx.bundles import bundle, hub
from florence_onnx.bundles.own_tasks import gather
from florence_onnx.runtime import providers
from florence_onnx.runtime.load_options import LoadOptions
from tests.conftest import NO_TORCH, Exported

torch = pytest.importorskip("torch", reason=NO_TORCH)
onnx = pytest.importorskip("onnx", reason=NO_TORCH)
from onnx import helper, numpy_helper  # noqa: E402

from export.bundles import writer  # noqa: E402
from export.precisions import quantization  # noqa: E402
from export.verification import checks  # noqa: E402
from florence_onnx.runtime.engine import OnnxEngine  # noqa: E402

WIDTH, CHANNELS = 64, 48


def write_product(path: Path, weight: np.ndarray, *, is_gemm: bool) -> None:
    """A graph of one product of `x` and `weight` `(WIDTH, CHANNELS)`, with a bias if it is a Gemm."""
    value = helper.make_tensor_value_info
    bias = np.linspace(-1, 1, CHANNELS, dtype=np.float32)
    inputs = ["x", "w", "b"] if is_gemm else ["x", "w"]
    graph = helper.make_graph(
        [helper.make_node("Gemm" if is_gemm else "MatMul", inputs, ["y"], name="product")],
        "product",
        [value("x", onnx.TensorProto.FLOAT, ["rows", WIDTH])],
        [value("y", onnx.TensorProto.FLOAT, ["rows", CHANNELS])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")][: len(inputs) - 1],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))


@pytest.mark.parametrize("is_gemm", [False, True])
@pytest.mark.parametrize(("form", "bound"), [("dynamic", 0.06), ("blocks-8", 0.06), ("blocks-4", 0.45)])
def test_a_product_stays_within_what_its_bits_allow(tmp_path: Path, form: str, bound: float, is_gemm: bool) -> None:
    random = np.random.default_rng(0)
    weight = random.normal(0, 1, (WIDTH, CHANNELS)).astype(np.float32) * np.geomspace(
        0.01, 1, CHANNELS, dtype=np.float32
    )
    x = random.normal(0, 1, (5, WIDTH)).astype(np.float32)
    path = tmp_path / "product.onnx"
    write_product(path, weight, is_gemm=is_gemm)
    exact = OnnxEngine(path, LoadOptions("cpu")).run({"x": x})["y"]
    if form == "dynamic":
        quantization.to_dynamic_int8(path)
    else:
        quantization.to_blocks(path, bits=int(form[-1]))
    (node,) = onnx.load(str(path)).graph.node
    assert node.op_type == ("DynamicQuantizeMatMul" if form == "dynamic" else "MatMulNBits")
    found = OnnxEngine(path, LoadOptions("cpu")).run({"x": x})["y"]
    spread = np.sqrt((weight**2).sum(axis=0))  # of a product's entries, channel by channel
    error = np.abs(found - exact).max(axis=0) / spread
    assert 0 < error.max() < bound


def test_extreme_activations_and_weights_do_not_overflow(tmp_path: Path) -> None:
    """Full 8-bit weights would saturate the 16-bit sums of CPUs without VNNI."""
    path = tmp_path / "product.onnx"
    write_product(path, np.ones((WIDTH, CHANNELS), dtype=np.float32), is_gemm=False)
    quantization.to_dynamic_int8(path)
    x = np.ones((3, WIDTH), dtype=np.float32)
    np.testing.assert_allclose(OnnxEngine(path, LoadOptions("cpu")).run({"x": x})["y"], WIDTH, rtol=0.01)


@pytest.fixture(scope="module")
def several(tiny: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("several") / "out"
    writer.export_bundles(
        tiny.checkpoint, output, precisions=["fp32", "int8", "int4", "int8"], tasks=gather(["docvqa"])
    )
    return output


def op_types(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node}


def test_several_precisions_lie_in_one_directory(several: Path) -> None:
    assert sorted(path.name for path in several.iterdir()) == ["fp32", "int4", "int8"]
    assert Florence2.from_pretrained(several, device="cpu").info()["precision"] == "int8", "the default on a CPU"
    assert Florence2.from_pretrained(several, device="cpu", precision="fp32").info()["precision"] == "fp32"
    assert all(bundle.read(several, name).tasks == gather(["docvqa"]) for name in ("fp32", "int8", "int4"))
    with pytest.raises(
        BundleFormatError, match=r"has precisions fp32, int4, int8, not fp16; export it with --precision"
    ):
        bundle.read(several, "fp16")


def test_the_encoders_are_dynamic_and_the_decoder_is_in_blocks(several: Path) -> None:
    for precision in ("int8", "int4"):
        graphs = bundle.read(several, precision).graphs
        assert "DynamicQuantizeMatMul" in op_types(graphs[bundle.VISION_ENCODER])
        assert "DynamicQuantizeMatMul" in op_types(graphs[bundle.TEXT_ENCODER])
        assert {"MatMulNBits", "GatherBlockQuantized"} <= op_types(graphs[bundle.DECODER])
    sizes = {name: (several / name / bundle.WEIGHTS).stat().st_size for name in ("fp32", "int8", "int4")}
    assert sizes["int4"] < sizes["int8"] < sizes["fp32"]


def test_image_features_in_integers_stay_near_fp32(several: Path, photographs: list[object]) -> None:
    exact = Florence2.from_pretrained(several, device="cpu", precision="fp32").encode(photographs[0])
    small = Florence2.from_pretrained(several, device="cpu", precision="int8").encode(photographs[0])
    error = np.abs(exact.image_features - small.image_features)
    assert 0 < error.mean() < 0.1 * np.abs(exact.image_features).mean()


def test_the_vision_encoder_may_keep_fp32(tiny: Exported, tmp_path: Path) -> None:
    written = writer.export_bundle(tiny.checkpoint, tmp_path / "out", precision="int8", vision_precision="fp32")
    assert "DynamicQuantizeMatMul" not in op_types(written.graph(bundle.VISION_ENCODER))
    assert "MatMulNBits" in op_types(written.graph(bundle.DECODER))
    info = Florence2.from_bundle(written, LoadOptions(device="cpu")).info()
    assert (info["precision"], info["vision_precision"]) == ("int8", "fp32")
    assert written.verification["graphs"][bundle.VISION_ENCODER]["max_rel"] < 1e-4, "measured as what it is"
    with pytest.raises(CheckpointError, match="vision encoder; choose one of fp32, fp16, int8"):
        writer.export_bundle(tiny.checkpoint, tmp_path / "x", precision="int8", vision_precision="int4")


def test_a_vision_precision_that_would_do_nothing_is_refused(tiny: Exported, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"fp32 bundle is exact in every graph.* fp16, int8, int4"):
        writer.export_bundle(tiny.checkpoint, tmp_path / "out", vision_precision="int8")
    assert list(tmp_path.iterdir()) == []


def test_the_vision_encoder_is_held_to_its_own_bound(
    tiny: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound of int8 is much larger than that of fp16: an fp16 graph in an int8 bundle has fp16's."""
    monkeypatch.setitem(checks.MAX_RELATIVE_ERROR, "fp16", 1e-9)
    with pytest.raises(VerificationError, match=r"vision_encoder\.onnx does not reproduce the checkpoint in fp16"):
        writer.export_bundle(tiny.checkpoint, tmp_path / "out", precision="int8", vision_precision="fp16")


def test_each_device_prefers_what_it_has_kernels_for() -> None:
    available = ["CUDAExecutionProvider", "OpenVINOExecutionProvider", "CPUExecutionProvider"]
    assert providers.preferred_precisions("cpu", None, available)[0] == "int8"
    assert providers.preferred_precisions("cuda", None, available) == ("fp16", "fp32")
    assert providers.preferred_precisions("auto", None, available) == ("fp16", "fp32"), "CUDA comes first"
    assert providers.preferred_precisions("openvino", None, available) == ("fp32", "fp16")
    assert providers.preferred_precisions("cpu", ["CUDAExecutionProvider"], available) == ("fp16", "fp32")


def test_the_preference_reaches_the_files(several: Path) -> None:
    assert bundle.read(several, preferred=("fp16", "fp32")).precision == "fp32"
    assert hub.resolve(several, preferred=("int4",)).precision == "int4"
