"""The CUDA provider takes all nodes of every graph: sessions are opened under the stub, on a machine without a GPU.

`FLORENCE_ONNX_TEST_BUNDLES` names the bundles to test, separated as in PATH; the default is the built-in demo, in fp16.
These tests show where nodes are placed, and nothing about what the kernels compute.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from florence_onnx.bundles import bundle
from tests.cuda import cuda_stub

REASON = cuda_stub.unavailable()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON or "never")

BUNDLES = os.environ.get("FLORENCE_ONNX_TEST_BUNDLES", str(bundle.DEMO_DIRECTORY)).split(os.pathsep)
SIZES_OF_A_STEP = {"Gather": 3, "Unsqueeze": 3, "Concat": 1, "Reshape": 1, "Equal": 1, "Where": 1}
SHAPES_ON_CPU: dict[str, dict[str, int]] = {
    bundle.VISION_ENCODER: {},
    # the end of the slice of position embeddings, for any length of a prompt
    bundle.TEXT_ENCODER: {"Gather": 1, "Add": 1, "Unsqueeze": 1},
    # the shape that the indices of `ScatterND` are expanded to, for any number of prompts and tokens
    bundle.DECODER: SIZES_OF_A_STEP,
    bundle.DECODER_TOP: SIZES_OF_A_STEP,
}
"""Nodes that ONNX Runtime keeps on the CPU on purpose, the same in every model and precision: arithmetic on shapes,
which are a few numbers on the host."""
JS_SHAPES_ON_CPU = {
    "encoder_model": {"Gather", "Slice", "Concat"},
    "decoder_model_merged": {"Gather", "Slice", "Concat", "Add"},
}
"""The same in the layout of transformers.js, as torch exports it, where their numbers grow with the layers. In the
smallest model, in fp32 and fp16: 3, 14 and 8 in the encoder; 11, 48, 28 and 1 in the decoder; none in other graphs."""
JS_DECODER = "decoder_model_merged"
"""The decoder of that layout: it has an `If`, which cannot be captured, and whose condition must be on the host."""


def precision(folder: Path) -> str | None:
    """The precision to load: that of the transformers.js layout is in the names of its files."""
    return "fp16" if (folder / "onnx" / f"{JS_DECODER}_fp16.onnx").is_file() else None


GRAPHS = [
    (folder, name, path)
    for folder in BUNDLES
    for name, path in bundle.read(Path(folder), precision(Path(folder))).graphs.items()
]


def plan(graphs: list[str]) -> dict[str, dict[str, Any]]:
    """The placements of graphs by path, found in a process under the stub."""
    found: dict[str, dict[str, Any]] = cuda_stub.run("-m", "tests.cuda.cuda_placement", *graphs)
    return found


@pytest.fixture(scope="module")
def placements() -> dict[str, dict[str, Any]]:
    """The placement of every graph of every bundle, by path."""
    return plan([str(path) for _, _, path in GRAPHS])


@pytest.fixture(params=GRAPHS, ids=lambda graph: f"{Path(graph[0]).parent.name}/{Path(graph[0]).name}/{graph[1]}")
def graph(request: pytest.FixtureRequest, placements: dict[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The name and placement of one graph."""
    _, name, path = request.param
    return name, placements[str(path)]


def test_every_node_that_computes_is_on_cuda(graph: tuple[str, dict[str, Any]]) -> None:
    name, placed = graph
    if name in SHAPES_ON_CPU:
        assert placed["elsewhere"] == SHAPES_ON_CPU[name]
        assert placed["nodes"] > 50, "the count works"
    else:
        assert set(placed["elsewhere"]) == JS_SHAPES_ON_CPU.get(name, set())
        assert placed["elsewhere"].get("Add", 0) <= 1, "all others add hidden states"
        assert placed["nodes"] > sum(placed["elsewhere"].values())


def test_nothing_is_copied_between_host_and_device(graph: tuple[str, dict[str, Any]]) -> None:
    name, placed = graph
    assert placed["copies"] == (1 if name == JS_DECODER else 0)


def test_the_graph_can_be_captured(graph: tuple[str, dict[str, Any]]) -> None:
    name, placed = graph
    assert ("control flow" in placed["cuda_graph"]) if name == JS_DECODER else placed["cuda_graph"] == ""


def test_nodes_that_cuda_does_not_take_are_found(tmp_path: Path) -> None:
    """CUDA has no Pad of integers: one in the middle of a graph goes to the CPU, with two copies, and forbids a capture."""
    onnx = pytest.importorskip("onnx", reason="builds a graph: pip install onnx")
    floating, integer = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    node = onnx.helper.make_node
    nodes = [
        node("Cast", ["x"], ["whole"], to=integer),
        node("Pad", ["whole", "widths"], ["padded"]),
        node("Cast", ["padded"], ["y"], to=floating),
    ]
    x, y = (onnx.helper.make_tensor_value_info(name, floating, [size]) for name, size in (("x", "n"), ("y", "m")))
    widths = onnx.helper.make_tensor("widths", integer, [2], [1, 1])
    graph = onnx.helper.make_graph(nodes, "padding", [x], [y], [widths])
    path = tmp_path / "graph.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8), path)
    placed = plan([str(path)])[str(path)]
    assert placed["elsewhere"] == {"Pad": 1}
    assert placed["copies"] == 2
    assert "have not been partitioned to the CUDAExecutionProvider" in placed["cuda_graph"]
