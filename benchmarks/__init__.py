"""Benchmarks by question. They import `florence_onnx` and `export`; neither imports them.

    cpu       how fast, against other runtimes (`compare`), and by stage, operator and option
    gpu       the same on one NVIDIA GPU
    serving   the server under load and under malformed requests; fal against a local server
    quality   what lower precision costs in right and wrong answers

Beside them: `checkpoints` and `models` make what is measured, `costs` counts its operations and bytes, `machine`
describes where.
"""

from florence_onnx.runtime import telemetry  # noqa: F401  # ONNX Runtime must not be imported before this
