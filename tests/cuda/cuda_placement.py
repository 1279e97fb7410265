"""Where the nodes of graphs land on the CUDA provider: one JSON object a graph, `python -m tests.cuda.cuda_placement GRAPH …`.

Sessions are created exactly as `device="cuda"` does and never run. On a machine without a card the process needs the
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
    """What ONNX Runtime plans for a graph.

    Returns:
        `nodes`, their number; `elsewhere`, how many of each operator are not on CUDA; `copies`, the copies between host
        and device that were inserted; `cuda_graph`, why ONNX Runtime refuses to capture the graph, empty if it does not.
    """
    with tempfile.TemporaryDirectory() as scratch:
        planned = Path(scratch) / "planned.onnx"
        # copies are inserted after nodes are counted, and stand in the file only
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
        "cuda_graph": _refusal(graph),
    }


def _operator(kind: str) -> bytes:
    """How an ONNX file spells a node's operator: field 4, its length, its name."""
    return bytes((4 << 3 | 2, len(kind))) + kind.encode()


def _refusal(graph: Path) -> str:
    return OnnxEngine(graph, LoadOptions("cuda"), cuda_graphs=True).capture_refusal


if __name__ == "__main__":
    print(json.dumps({name: placement(Path(name)) for name in sys.argv[1:]}))
