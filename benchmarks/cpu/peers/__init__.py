"""The runtimes that are compared, one module each, behind the interface `protocol.Runner`."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.cpu.jobs import Peer

REFERENCE = "transformers-fp32"
"""The peer whose tokens the exact peers must reproduce."""

RIVALS: tuple[Peer, ...] = (
    Peer(REFERENCE, "transformers, fp32", "pytorch", "checkpoint", "fp32", {"dtype": "float32"}, is_exact=True),
    Peer("transformers-bf16", "transformers, bf16", "pytorch", "checkpoint", "bf16", {"dtype": "bfloat16"}),
    Peer(
        "transformers-compile",
        "transformers, fp32, static cache, torch.compile",
        "pytorch",
        "checkpoint",
        "fp32",
        {"dtype": "float32", "compile": True},
        is_exact=True,
    ),
    Peer(
        "plain-onnx", "plain ONNX (four graphs), ONNX Runtime, fp32", "ours", "transformers.js", "fp32", is_exact=True
    ),
    Peer(
        "openvino-fp32",
        "OpenVINO on our graphs, fp32",
        "openvino_graphs",
        "bundle:fp32",
        "fp32",
        {"hint": "f32"},
        is_exact=True,
    ),
    Peer(
        "openvino-bf16", "OpenVINO on our graphs, bf16 hint", "openvino_graphs", "bundle:fp32", "bf16", {"hint": "bf16"}
    ),
    Peer(
        "transformers.js",
        "transformers.js in Node, fp32",
        "transformers_js.mjs",
        "transformers.js",
        "fp32",
        is_exact=True,
    ),
    Peer("ours-openvino", "ours on OpenVINO's provider", "ours", "bundle:fp32", "fp32", {"device": "openvino"}),
)


def ours(precisions: Iterable[str]) -> list[Peer]:
    """Returns this runtime on the CPU provider, as one peer per precision of its bundle."""
    return [
        Peer(f"ours-{name}", f"ours, {name}", "ours", f"bundle:{name}", name, is_exact=name == "fp32")
        for name in precisions
    ]
