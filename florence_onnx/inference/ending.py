"""Answers that have to end before they begin: for them no image is read, or none is encoded."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import TypeAlias, TypeVar

from PIL import Image as PILImage

from florence_onnx.generation.progress import Clock, Progress, stop_error
from florence_onnx.generation.search import GeneratedSequence, Search, unstarted
from florence_onnx.prediction import EncodedImage

T = TypeVar("T")
Seen: TypeAlias = EncodedImage | PILImage.Image
"""An encoded image, or a loaded one that was not encoded, since all answers about it were ended before."""


class EncodingTime:
    """The least time that a vision encoder took so far: what a call must have left for the encoder to be worth its run."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._least: dict[Hashable, float] = {}

    def least(self, image_size: Hashable) -> float:
        """Seconds of the quickest run for images of a size; 0 before the first one."""
        return self._least.get(image_size, 0.0)

    def of(self, image_size: Hashable, run: Callable[[], T]) -> T:
        """Measures a run and returns its result."""
        begin = self._clock()
        result = run()
        seconds = self._clock() - begin
        self._least[image_size] = min(self._least.get(image_size, seconds), seconds)
        return result


def source_image(seen: Seen) -> PILImage.Image:
    """The image itself, RGB."""
    return seen.source_image if isinstance(seen, EncodedImage) else seen


def is_hopeless(progress: Sequence[Progress], seconds: float = 0.0) -> bool:
    """Whether none of the answers about an image can begin: each has to end within the `seconds` that encoding takes."""
    reasons = [each.reason(seconds) for each in progress]  # all are asked, since a reason stays
    return bool(reasons) and None not in reasons


def refuse_if_all_raise(progress: Sequence[Progress]) -> None:
    """Spares the reading of an image where every answer about it would be an error anyway.

    Raises:
        DeadlineError: All have to end, and the first for its deadline.
        CancelledError: All have to end, and the first because it was cancelled.
    """
    if all(each.raises for each in progress) and is_hopeless(progress):
        reason = progress[0].reason()
        assert reason is not None, "hopeless for a reason"
        raise stop_error(reason)


def show(progress: Sequence[Progress], image: Seen) -> None:
    """Shows an image to those who follow the answers about it."""
    for each in progress:
        each.image = image


def not_begun(search: Search, progress: Progress) -> GeneratedSequence:
    """The answer to a prompt that has to end before its first decode step: no tokens but the first."""
    reason = progress.reason()
    assert reason is not None, "only an answer that has to end is not begun"
    return unstarted(search, reason)
