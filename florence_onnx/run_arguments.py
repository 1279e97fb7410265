"""The arguments that the calls of `Florence2` for one image share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from florence_onnx.answers.locations import Region
    from florence_onnx.bundles.bundle import ImageSize
    from florence_onnx.detecting.absence import Absent
    from florence_onnx.generation.options import GenerationOptions
    from florence_onnx.generation.progress import Cancel, OnDeadline
    from florence_onnx.images.placement import Fit
    from florence_onnx.limits import Seconds
    from florence_onnx.tasks import Task
    from florence_onnx.tiling.tiles import Tiles


class RunArguments(TypedDict, total=False):
    """Keyword arguments of `Florence2.run`, which describes them."""

    text_input: str | None
    region: Region | str | None
    tiles: Tiles | None
    options: GenerationOptions | None
    image_size: ImageSize | None
    fit: Fit | None
    deadline: Seconds | None
    cancel: Cancel | None
    on_deadline: OnDeadline


class DetectArguments(TypedDict, total=False):
    """Keyword arguments of `Florence2.detect`, which describes them."""

    task: Task[Any] | str
    min_score: float
    nms: float | None
    absent: Absent
    threshold: float | None
    tiles: Tiles | None
    options: GenerationOptions | None
    deadline: Seconds | None
    cancel: Cancel | None
    on_deadline: OnDeadline
