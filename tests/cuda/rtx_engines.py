"""TensorRT engines of a bundle, built without a GPU; facts as JSON: `python -m tests.cuda.rtx_engines BUNDLE [GRAPH…]`.

TensorRT for RTX parses and builds on the CPU. Its parser is TensorRT's; its engines are for RTX GPUs, and are thrown
away. Its networks are strongly typed and those of ONNX Runtime's TensorRT provider are not, so this does not show in
which types an engine computes.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt

from florence_onnx.bundles import bundle as bundles
from florence_onnx.runtime import tensorrt

WORKSPACE = 2 << 30
MAX_BATCH = 2


def build(bundle: bundles.Bundle, graph: str) -> dict[str, Any]:
    """Parses a graph and builds its engine with the profiles of `florence_onnx.runtime.tensorrt`.

    Returns:
        `inputs` and `outputs`, the network's shapes, with -1 for dynamic axes; `layers`, their number; `profile`, the
        minimum, optimum and maximum shape of each input; `bytes` of the engine; `seconds` for building it.
    """
    begin = time.monotonic()
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(bundle.graph(graph))):
        raise RuntimeError("\n".join(str(parser.get_error(at)) for at in range(parser.num_errors)))
    settings = builder.create_builder_config()
    settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
    profile = builder.create_optimization_profile()
    shapes = tensorrt.profiles(bundle, MAX_BATCH)[graph]
    for name in shapes["min"]:
        profile.set_shape(name, *(shapes[kind][name] for kind in ("min", "opt", "max")))
    settings.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, settings)
    if plan is None:
        raise RuntimeError(f"TensorRT builds no engine of {graph}")
    if _has_driver():  # without one, deserializing is refused
        trt.Runtime(logger).deserialize_cuda_engine(plan)
    inputs = {network.get_input(at).name: list(network.get_input(at).shape) for at in range(network.num_inputs)}
    outputs = {network.get_output(at).name: list(network.get_output(at).shape) for at in range(network.num_outputs)}
    return {
        "inputs": inputs,
        "outputs": outputs,
        "layers": network.num_layers,
        "profile": {name: [list(shape) for shape in profile.get_shape(name)] for name in inputs},
        "bytes": plan.nbytes,
        "seconds": time.monotonic() - begin,
    }


def _has_driver() -> bool:
    from florence_onnx.runtime import cuda

    return cuda.find_gpu() is not None


if __name__ == "__main__":
    read = bundles.read(Path(sys.argv[1]))
    wanted = sys.argv[2:] or [*tensorrt.graphs(read)]
    print(json.dumps({graph: build(read, graph) for graph in wanted}))
