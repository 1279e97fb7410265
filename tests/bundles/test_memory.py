"""Device memory: of a graph, as found in the graph, and of a whole model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from florence_onnx import DeviceMemoryError, Florence2, ProviderError
from florence_onnx.bundles import bundle
from florence_onnx.bundles.memory import CONTEXT_BYTES, IMAGE, estimate, is_out_of_memory, table

onnx = pytest.importorskip("onnx", reason="reads graphs: pip install -e '.[export]'")

DEMO = bundle.read(bundle.DEMO_DIRECTORY)


def chain(tmp_path: Path) -> Any:
    """x (n, 256) -> a (n, 256) -> b (n, 512) -> view -> c (2n, 256) -> y; 1024, 2048 and 2048 bytes for n = 1."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Concat", ["a", "a"], ["b"], axis=1),
        node("Reshape", ["b", "shape"], ["view"]),
        node("Exp", ["view"], ["c"]),
        node("MatMul", ["c", "w"], ["y"]),
    ]
    weights = [
        numpy_helper.from_array(np.array([-1, 256]), "shape"),
        numpy_helper.from_array(np.ones((256, 3), np.float32), "w"),
    ]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", ["n", 256]), ("y", ["m", 3]))
    )
    return helper.make_model(
        helper.make_graph(nodes, "chain", [x], [y], weights), opset_imports=[helper.make_opsetid("", 18)]
    )


@pytest.mark.parametrize("count", [1, 5])
def test_peak_activations_of_a_chain(tmp_path: Path, count: int) -> None:
    """The peak is b and c: the view shares the memory of b, a is freed, inputs and outputs do not count."""
    memory = pytest.importorskip("export.bundles.memory", reason="pip install -e '.[export]'")
    graph = chain(tmp_path)
    assert memory.activation_bytes(graph, {"x": (count, 256)}) == count * (2048 + 2048)
    assert memory.weight_bytes(graph) == 2 * 8 + 256 * 3 * 4


def test_weights_that_two_graphs_share_count_for_both() -> None:
    """The embedding is in the text encoder's session and twice in the decoder's, there also transposed as the head."""
    embedding = 2 * DEMO.sizes.vocab_size * DEMO.sizes.width
    weights = DEMO.memory["weights"]
    assert sum(weights.values()) > (DEMO.path / bundle.WEIGHTS).stat().st_size
    assert weights[bundle.TEXT_ENCODER] > embedding
    assert weights[bundle.DECODER_TOP] > 2 * embedding


def test_activations_scale_with_images_and_tokens() -> None:
    memory = pytest.importorskip("export.bundles.memory", reason="pip install -e '.[export]'")
    vision = onnx.load(str(DEMO.graph(bundle.VISION_ENCODER)))
    for count in (1, 2, 8):
        found = memory.activation_bytes(vision, {"pixel_values": (count, 3, *DEMO.sizes.image_size[::-1])})
        assert found == pytest.approx(count * DEMO.memory[IMAGE], rel=0.02)
    from florence_onnx.runtime.tensorrt import profiles

    decoder = onnx.load(str(DEMO.graph(bundle.DECODER_TOP)))
    usual = profiles(DEMO, 1)[bundle.DECODER_TOP]["opt"]
    for count in (4, 8, 16):  # below that the demo, whose vocabulary is small, needs more elsewhere
        shapes = {name: (1, count, *shape[2:]) if shape[:2] == (1, 3) else shape for name, shape in usual.items()}
        assert memory.activation_bytes(decoder, shapes) == pytest.approx(count * DEMO.memory["token"], rel=0.05)


def test_more_prompts_and_beams_need_more() -> None:
    rows = table(DEMO)
    assert rows is not None
    assert [(row["batch"], row["num_beams"]) for row in rows] == [(1, 1), (1, 3), (8, 1), (8, 3), (32, 1), (32, 3)]
    totals = [row["total"] for row in rows]
    assert totals == sorted(totals)
    assert len(set(totals)) == len(totals)
    for row in rows:
        parts = [row[name] for name in ("weights", "activations", "caches", "buffers")]
        assert row["total"] == sum(parts) + CONTEXT_BYTES
    long = estimate(DEMO, 1, 1, num_prompt_tokens=959)
    short = estimate(DEMO, 1, 1)
    assert long is not None
    assert short is not None
    assert long.caches > short.caches
    assert long.activations > short.activations


def test_no_estimate_without_data_in_the_bundle() -> None:
    assert table(replace(DEMO, memory={})) is None
    assert estimate(replace(DEMO, precision="int8"), 1, 1) is None


def test_info_has_the_estimates() -> None:
    found = Florence2.from_pretrained("demo", device="cpu").info()
    assert json.loads(json.dumps(found))["device_memory"] == table(DEMO)


@pytest.mark.parametrize(
    ("said", "is_full"),
    [
        ("bfc_arena.cc:360 Failed to allocate memory for requested buffer of size 20736", True),
        ("bfc_arena.cc:360 Available memory of 5376 is smaller than requested bytes of 131072", True),
        ("CUDA failure 2: out of memory ; GPU=0", True),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED", True),
        ("CUDA failure 209: no kernel image is available for execution on the device", False),
        ("CUDA failure 29: driver shutting down", False),
    ],
)
def test_which_errors_mean_that_device_memory_is_full(said: str, is_full: bool) -> None:
    assert is_out_of_memory(RuntimeError(said)) is is_full


def test_the_error_is_also_a_memory_error() -> None:
    assert issubclass(DeviceMemoryError, ProviderError)
    assert issubclass(DeviceMemoryError, MemoryError)
