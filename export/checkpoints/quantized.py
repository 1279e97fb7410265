"""Checkpoints whose weights are no longer floats, by the tool that quantized them. None can be exported; each has a way
out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from florence_onnx.errors import CheckpointError

from .weights import Weights

_WAY_OUT = (
    "florence_onnx exports from float weights. Give the checkpoint that was quantized (fp32, fp16 or bf16), and choose "
    "the size of "
    "the export with --precision int8 or int4"
)

_BY_NAMES: tuple[tuple[str, Callable[[str], bool]], ...] = (
    (
        "bitsandbytes",
        lambda name: name.endswith((".SCB", ".weight_format")) or ".absmax" in name or "bitsandbytes__" in name,
    ),
    ("GPTQ", lambda name: name.endswith(".g_idx")),
    ("MLX", lambda name: name.endswith(".biases")),
    ("AWQ", lambda name: name.endswith(".qweight")),
    ("compressed-tensors", lambda name: name.endswith((".weight_packed", ".weight_shape"))),
    ("fp8", lambda name: name.endswith((".weight_scale_inv", ".weight_scale"))),
)
"""What each tool stores beside the weights; the first that fits counts, as GPTQ stores `qweight` as well."""

_BY_CONFIG = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "compressed-tensors": "compressed-tensors",
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
}


def find_quantization(config_json: Mapping[str, Any], stored: Weights) -> str | None:
    """Names the tool that quantized a checkpoint, and what shows it.

    Args:
        config_json: The checkpoint's config.json.
        stored: Tensors by stored name.

    Returns:
        A phrase such as `GPTQ (model.…q_proj.qweight is torch.int32)`; None where the weights are plain floats.
    """
    for tool, fits in _BY_NAMES:
        name = next((name for name in stored if fits(name)), None)
        if name is not None:
            return f"{tool} ({name} is {stored[name].dtype})"
    name = next((name for name, tensor in stored.items() if "float8" in str(tensor.dtype)), None)
    if name is not None:
        return f"fp8 ({name} is {stored[name].dtype})"
    config = config_json.get("quantization_config")
    name = next((name for name, tensor in stored.items() if tensor.ndim > 1 and _is_integer(tensor)), None)
    if isinstance(config, Mapping) and name is not None:
        method = str(config.get("quant_method", "an unknown method"))
        return f"{_BY_CONFIG.get(method, method)} ({name} is {stored[name].dtype})"
    return None


def _is_integer(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point()


def check_not_quantized(folder: Path, config_json: Mapping[str, Any], stored: Weights) -> None:
    """Refuses a quantized checkpoint.

    Raises:
        CheckpointError: It is one, or its config.json says so although the weights are floats.
    """
    found = find_quantization(config_json, stored)
    if found is not None:
        raise CheckpointError(f"{folder} is quantized by {found}. {_WAY_OUT}")
    config = config_json.get("quantization_config")
    if config:
        method = config.get("quant_method", "an unknown method") if isinstance(config, Mapping) else config
        raise CheckpointError(
            f"{folder}/config.json has a quantization_config ({method}), but all weights are floats: they were merged "
            "or converted "
            "back. transformers would quantize them again when it loads them; remove quantization_config from "
            "config.json"
        )
