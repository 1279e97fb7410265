"""Providers of a graph's nodes under `device="cuda"`, as JSON: `python -m tests.cuda.cuda_placement GRAPH …`.

Sessions are opened as `device="cuda"` opens them, and never run. On a machine without a GPU the process needs the
libraries of `tests/cuda/cuda_stub.py` in its LD_LIBRARY_PATH.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from florence_onnx.runtime.engine import OnnxEngine
from florence_onnx.runtime.load_options import LoadOptions

CUDA = "CUDAExecutionProvider"
COPIES = ("MemcpyToHost", "MemcpyFromHost")


def placement(graph: Path) -> dict[str, Any]:
    """Where ONNX Runtime places the nodes of a graph.

    Returns:
        `nodes`, their number; `elsewhere`, the number of those that are not on CUDA, by operator; `copies`, the number
        of copies between host and device that were inserted; `cuda_graph`, why the graph cannot be captured, empty if
        it can.
    """
    with tempfile.TemporaryDirectory() as scratch:
        planned = Path(scratch) / "planned.onnx"
        # copies are inserted after the nodes were recorded, so that only the saved graph has them
        options = {
            "optimized_model_filepath": str(planned),
            "session.optimized_model_external_initializers_file_name": "planned.data",
        }
        engine = OnnxEngine(graph, LoadOptions("cuda", session_options=options))
        content = planned.read_bytes()
    parts = engine._session.get_provider_graph_assignment_info()
    placed = [(part.ep_name, node.op_type) for part in parts for node in part.get_nodes()]
    return {
        "nodes": len(placed),
        "elsewhere": dict(Counter(kind for provider, kind in placed if provider != CUDA)),
        "copies": sum(content.count(_operator(kind)) for kind in COPIES),
        "cuda_graph": _capture_error(graph),
    }


def _operator(kind: str) -> bytes:
    """A node's operator as an ONNX file (protobuf) encodes it: field 4, the length of the name, the name."""
    return bytes((4 << 3 | 2, len(kind))) + kind.encode()


def _capture_error(graph: Path) -> str:
    return OnnxEngine(graph, LoadOptions("cuda"), cuda_graphs=True).capture_error


if __name__ == "__main__":
    print(json.dumps({name: placement(Path(name)) for name in sys.argv[1:]}))
