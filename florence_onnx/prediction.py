"""What a model hands back: an encoded image, and an answer."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage

from florence_onnx.answers.results import Image, to_dict
from florence_onnx.errors import InputError
from florence_onnx.runtime.device_memory import DeviceArray
from florence_onnx.tasks import Task

R = TypeVar("R")


def encode_png(image: PILImage.Image) -> bytes:
    """An image as a PNG file, quickly: three times as fast as with Pillow's default level, and little larger."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image after the vision encoder, to be asked any number of tasks."""

    stored: npt.NDArray[np.float32] | DeviceArray = field(repr=False)
    """`(N, D)`, where the vision encoder left them: for a card, in its memory."""
    source_image: PILImage.Image = field(repr=False)
    """The image itself, RGB."""

    @cached_property
    def image_features(self) -> npt.NDArray[np.float32]:
        """`(N, D)` on the host; copied there when first asked for."""
        return self.stored.download() if isinstance(self.stored, DeviceArray) else self.stored

    @property
    def size(self) -> tuple[int, int]:
        """`(width, height)` in pixels, the frame of all coordinates."""
        return self.source_image.size


@dataclass(frozen=True)
class Prediction(Generic[R]):
    """One answer."""

    results: R
    """The answer in fal's shape; see `florence_onnx.answers.results`."""
    task: Task[R]
    """The task that was asked."""
    text: str
    """What the model said, with special and location tokens."""
    token_ids: tuple[int, ...]
    """The same in tokens, from the decoder start token on."""
    truncated: bool
    """Whether the token limit cut the answer off; its last item may then be missing or incomplete."""
    source_image: PILImage.Image = field(repr=False, compare=False)
    """The image that was asked about, RGB."""

    @property
    def image(self) -> Image | None:
        """The annotated image as fal describes it, in a `data:` URI; None for tasks without geometry."""
        if not self.task.has_image:
            return None
        content = encode_png(self.draw())
        encoded = base64.b64encode(content).decode("ascii")
        return Image(
            url=f"data:image/png;base64,{encoded}",
            content_type="image/png",
            file_name=f"{self.task.slug}.png",
            file_size=len(content),
            width=self.source_image.width,
            height=self.source_image.height,
        )

    def draw(self) -> PILImage.Image:
        """The image with the answer drawn on it.

        Raises:
            InputError: The task's answer is text.
        """
        if isinstance(self.results, str):
            raise InputError(f"{self.task.slug} answers with text: there is nothing to draw")
        from florence_onnx.answers import draw  # fonts and drawing: not for those who only want results

        return draw.draw(self.source_image, self.results)

    def to_dict(self, *, with_image: bool = False) -> dict[str, Any]:
        """fal's JSON for this answer.

        Args:
            with_image: Whether `image` holds the annotated image; otherwise it is None, as fal has it when unset.

        Returns:
            `{"results": …}`, and `"image"` for the tasks where fal has one.
        """
        answer: dict[str, Any] = {"results": to_dict(self.results)}
        if self.task.has_image:
            answer["image"] = to_dict(self.image) if with_image else None
        return answer
