"""Which bundle stands for the checkpoint that a tool names, and which arguments of `from_pretrained` may be passed over."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from florence_onnx.errors import InputError

EXPORTS = {
    "microsoft/Florence-2-base": "onnx-community/Florence-2-base",
    "microsoft/Florence-2-base-ft": "onnx-community/Florence-2-base-ft",
    "microsoft/Florence-2-large": "onnx-community/Florence-2-large",
    "microsoft/Florence-2-large-ft": "onnx-community/Florence-2-large-ft",
    "florence-community/Florence-2-base": "onnx-community/Florence-2-base",
    "florence-community/Florence-2-base-ft": "onnx-community/Florence-2-base-ft",
    "florence-community/Florence-2-large": "onnx-community/Florence-2-large",
    "florence-community/Florence-2-large-ft": "onnx-community/Florence-2-large-ft",
}
"""Published checkpoints that are published as ONNX too."""

OURS = ("device", "precision", "providers", "provider_options", "session_options", "graph_cache", "max_batch")
"""Arguments of `Florence2.from_pretrained` that are passed on."""
_IGNORED = {
    *("torch_dtype", "dtype", "trust_remote_code", "attn_implementation", "device_map", "low_cpu_mem_usage"),
    *("local_files_only", "use_safetensors", "use_fast", "token", "use_auth_token", "code_revision", "force_download"),
}


def resolve_name(name: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The bundle of a published checkpoint; every other name as it is."""
    return name if Path(name).exists() else EXPORTS.get(os.fspath(name), name)


def loading_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments for `Florence2.from_pretrained` among those that a tool passes.

    Raises:
        InputError: One is unknown.
    """
    known = {*OURS, "revision", "cache_dir"}
    if unknown := set(arguments) - known - _IGNORED:
        raise InputError(
            f"from_pretrained does not take {', '.join(sorted(unknown))}; it takes {', '.join(sorted(known))}"
        )
    return {name: value for name, value in arguments.items() if name in known}
