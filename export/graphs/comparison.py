"""Comparing an ONNX graph with the torch module that it was exported from, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from florence_onnx.errors import VerificationError
from florence_onnx.runtime.engine import OnnxEngine
from florence_onnx.runtime.load_options import LoadOptions

DynamicAxes = Mapping[str, Mapping[int, str]]
"""Input or output name -> axis -> name of the axis; axes not named here are fixed."""
Tensors = Mapping[str, torch.Tensor]
"""Input tensors by name, in the order in which the module takes them."""


@dataclass(frozen=True)
class OutputError:
    """The error of one output of a graph against torch.

    Example: `OutputError(max_abs=2.4e-06, max_rel=3.1e-07)`
    """

    max_abs: float
    """Largest absolute difference."""
    max_rel: float
    """`max_abs` divided by the largest magnitude of torch's output. Element-wise ratios are meaningless near zero."""


def compare(
    module: Callable[..., Any],
    path: Path,
    inputs: Tensors,
    outputs: Sequence[str],
) -> dict[str, OutputError]:
    """Runs a graph on the CPU provider and the module on the same inputs.

    Args:
        module: As for `export_graph`.
        path: The `.onnx` file, in any precision; inputs are cast to the graph's own dtypes.
        inputs: Tensors by input name. An input that the graph does not have, because it was folded away, goes to the
            module only.
        outputs: Output names, in the module's order.

    Returns:
        The errors by output name.

    Raises:
        VerificationError: The shapes of an output differ.
    """
    engine = OnnxEngine(path, LoadOptions("cpu"))
    found = engine.run({name: value.numpy() for name, value in inputs.items() if name in engine.inputs})
    with torch.inference_mode():
        expected = module(*inputs.values())
    tensors = [expected] if isinstance(expected, torch.Tensor) else list(expected)
    return {
        name: _difference(path, name, reference.numpy(), found[name])
        for name, reference in zip(outputs, tensors, strict=True)
    }


def worst(measured: Iterable[dict[str, OutputError]]) -> dict[str, OutputError]:
    """Returns the largest errors of each output over several comparisons."""
    found: dict[str, OutputError] = {}
    for errors in measured:
        for name, error in errors.items():
            before = found.get(name, error)
            found[name] = OutputError(max(before.max_abs, error.max_abs), max(before.max_rel, error.max_rel))
    return found


def resized(inputs: Tensors, dynamic_axes: DynamicAxes, extra: int = 1) -> dict[str, torch.Tensor]:
    """Returns the inputs with every dynamic axis `extra` longer, filled by repeating from the start.

    Repeated masks, positions and token ids stay valid; random numbers would not be.
    """
    result = {}
    for name, value in inputs.items():
        for axis in dynamic_axes.get(name, {}):
            size = value.shape[axis]
            value = value.index_select(axis, torch.arange(size + extra) % max(size, 1)) if size else value
        result[name] = value.contiguous()
    return result


def _difference(path: Path, name: str, expected: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> OutputError:
    if expected.shape != found.shape:
        raise VerificationError(f"{path.name}: output {name} has shape {found.shape}, torch gives {expected.shape}")
    if expected.size == 0:
        return OutputError(0.0, 0.0)
    max_abs = float(np.abs(expected.astype(np.float64) - found.astype(np.float64)).max())
    if not np.isfinite(max_abs):  # NaN > bound is false, so a NaN would pass; infinity does not
        max_abs = float("inf")
    scale = max(float(np.abs(expected).max()), float(np.finfo(np.float32).tiny))
    return OutputError(max_abs, max_abs / scale)
