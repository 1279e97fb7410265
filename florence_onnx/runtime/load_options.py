"""How a model is loaded: the arguments of `Florence2.from_pretrained` that concern ONNX Runtime and the device, in one value."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from florence_onnx.runtime import graph_cache
from florence_onnx.runtime.providers import Options, Provider
from florence_onnx.runtime.sessions import CPU, SessionOptions


@dataclass(frozen=True)
class LoadOptions:
    """Device, execution provider and their options; `Florence2.from_pretrained` documents each in full.

    Values are checked where they are used, so that the error can name what is installed.
    """

    device: str = "auto"
    """`"auto"`, `"cpu"`, `"cuda"`, `"tensorrt"` or `"openvino"`."""
    precision: str | None = None
    """The bundle's, or `"bf16"` for an fp32 bundle that is computed in bf16; None takes the bundle's."""
    providers: Sequence[Provider] | None = None
    """Explicit execution providers, first choice first; replaces `device`."""
    provider_options: Options | None = None
    """Options of the device's execution provider, over this package's own."""
    session_options: SessionOptions | None = None
    """Attributes and config entries of `onnxruntime.SessionOptions`, over this package's own."""
    graph_cache: bool | str | os.PathLike[str] | None = None
    """Folder for optimised graphs; True for the default one, False for none, None for what the environment says."""
    max_batch: int | None = None
    """Most prompts in flight on the device; None for the device's default, 0 for no continuous batching."""

    @property
    def graph_cache_folder(self) -> Path | None:
        """Where optimised graphs are kept, None for nowhere.

        Raises:
            InputError: `graph_cache` is none of what it may be.
        """
        return graph_cache.folder(self.graph_cache)

    @property
    def is_for_cpu(self) -> bool:
        """Whether graphs run on ONNX Runtime's own CPU provider alone."""
        return self.device == "cpu" if self.providers is None else list(self.providers) == [CPU]
