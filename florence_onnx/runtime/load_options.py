"""`LoadOptions`: the arguments of `Florence2.from_pretrained` that concern ONNX Runtime and the device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from florence_onnx.bundles.bundle import ImageSize
from florence_onnx.bundles.precisions import Precision
from florence_onnx.runtime import graph_cache
from florence_onnx.runtime.providers import BF16, Options, Provider
from florence_onnx.runtime.sessions import CPU, SessionOptions


@dataclass(frozen=True)
class LoadOptions:
    """Device, execution provider and their options; `Florence2.from_pretrained` documents them in full.

    Values are checked where they are used, because errors name what is installed.
    """

    device: str = "auto"
    """`"auto"`, `"cpu"`, `"cuda"`, `"tensorrt"` or `"openvino"`."""
    precision: Precision | None = None
    """The bundle's precision, or `"bf16"` to compute an fp32 bundle in bf16; None for the bundle's."""
    providers: Sequence[Provider] | None = None
    """Execution providers in order of preference, instead of `device`."""
    provider_options: Options | None = None
    """Options of the device's execution provider; they override this package's defaults."""
    session_options: SessionOptions | None = None
    """Attributes and config entries of `onnxruntime.SessionOptions`; they override this package's defaults."""
    graph_cache: bool | str | os.PathLike[str] | None = None
    """Folder of the graph cache; True for the default folder, False for no cache, None for the environment's choice."""
    max_batch: int | None = None
    """Most prompts in flight on the device; None for the device's default, 0 for no continuous batching."""

    calibration: Sequence[str] = ()
    """Paths of files of `florence-onnx evaluate --write-calibration`, one a task."""
    image_size: ImageSize | None = None
    """Image size that is read by default, whose vision encoder is loaded; None for the bundle's default."""
    fit: Literal["stretch", "pad"] = "stretch"
    """How images are fitted into that size by default."""

    @property
    def graph_cache_folder(self) -> Path | None:
        """Folder of the graph cache, or None for no cache.

        Raises:
            InputError: `graph_cache` is neither a folder nor True, False or None.
        """
        return graph_cache.folder(self.graph_cache)

    @property
    def is_bf16(self) -> bool:
        """Whether fp32 graphs are computed in bf16."""
        return self.precision == BF16

    @property
    def is_for_cpu(self) -> bool:
        """Whether all graphs run on `CPUExecutionProvider` alone."""
        return self.device == "cpu" if self.providers is None else list(self.providers) == [CPU]
