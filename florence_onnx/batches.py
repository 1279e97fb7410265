"""The requests of a batch: read one by one, taken in portions, and each error given the place of its image.

Called by `model` alone. In: the arguments of `Florence2.run_each`. Out: portions of requests, and for each request that
fails an error with `index`.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
from PIL import Image as PILImage

from florence_onnx import tasks
from florence_onnx.answers.locations import Region
from florence_onnx.answers.placed import text_to_input
from florence_onnx.errors import FlorenceError, InputError
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.progress import Progress, stop_error
from florence_onnx.images.decoding import ImageInput
from florence_onnx.images.placement import Placement
from florence_onnx.images.preprocessing import Preparation
from florence_onnx.inference.answering import Answer, AnyImage, Key, image_key
from florence_onnx.inference.ending import Seen
from florence_onnx.limits import Limits, Repeated
from florence_onnx.prediction import EncodedImage
from florence_onnx.tasks import FormattedInput, Task

OnError = Literal["raise", "return"]
HOST_BATCH_SIZE = 8
"""Requests that are decoded at once where tensors pass through the host; measured in benchmarks/results/batches.md."""
DEVICE_BATCH_FACTOR = 4
"""With continuous batching, how many times `max_batch` requests are read at once: the batch runs empty at the end of a
portion, so it must be refilled several times before."""
_END = object()


@dataclass(frozen=True)
class Request:
    """A task about an image, its input checked and formatted."""

    index: int
    """Of its image in the whole batch, from 0."""
    task: Task[Any]
    image: ImageInput | EncodedImage
    given: FormattedInput
    progress: Progress = field(default_factory=Progress)
    """Who follows its answer, and what may end it early."""
    placement: Placement | None = None
    """Where the image lies in the model's input, if it has margins there: location tokens of the prompt are mapped by it."""

    @property
    def formatted_input(self) -> str:
        """The part of the prompt that the caller chose: text, a region's location tokens, or nothing."""
        return self._mapped(self.given.text or self.given.location_tokens)

    @property
    def prompt(self) -> str:
        """The whole prompt, ready for the tokenizer."""
        return self._mapped(self.task.fill_prompt(self.given))

    def _mapped(self, text: str) -> str:
        return text if self.placement is None else text_to_input(text, self.placement)


class Failures:
    """Raises the errors of single requests, or keeps them for their places in the answer."""

    def __init__(self, on_error: OnError, count: int | None) -> None:
        """Args:
        on_error: Whether to raise or to keep.
        count: How many requests there are; None where that is not known yet.

        Raises:
            InputError: `on_error` is something else.
        """
        if on_error not in ("raise", "return"):
            raise InputError(f'on_error must be "raise" or "return", got {on_error!r}')
        self.are_kept = on_error == "return"
        self.count = count
        self.by_index: dict[int, FlorenceError] = {}

    def add(self, indices: Sequence[int], error: FlorenceError) -> None:
        """Takes an error that concerns one image, of which several requests may be.

        Raises:
            FlorenceError: The error, unless errors are kept.
        """
        copies = [error, *(copy.copy(error) for _ in indices[1:])]
        for index, own in zip(indices, copies, strict=True):
            _name_place(own, index, self.count)
            if not self.are_kept:
                raise own
            self.by_index[index] = own


def _name_place(error: FlorenceError, index: int, count: int | None) -> None:
    """Puts `image 17 of 64: ` before the message; a batch of one needs no such thing."""
    if count == 1 or error.index is not None:
        return
    error.index = index
    of = "" if count is None else f" of {count}"
    error.args = (f"image {index + 1}{of}: {error}",)


def read_requests(
    task_or_tasks: Task[Any] | str | Iterable[Task[Any] | str],
    images: Iterable[AnyImage],
    text_inputs: Iterable[str | None] | None,
    regions: Iterable[Region | str | None] | None,
    failures: Failures,
    own: Mapping[str, Task[Any]],
    limits: Limits | None = None,
) -> Iterator[Request]:
    """Checks and formats the arguments of `Florence2.run_each`, an image at a time.

    Args:
        task_or_tasks: One for all images, or one an image.
        images: Read as far as requests are taken.
        text_inputs: One an image.
        regions: One an image.
        failures: Gets the errors of single requests.
        own: Tasks that the bundle carries, by slug.
        limits: What may end answers early, and who follows them; None for nothing and nobody.

    Raises:
        InputError: The sequences differ in length, or a single value was given for one of them.
    """
    limits = limits or Limits()
    columns = (
        Repeated(task_or_tasks) if isinstance(task_or_tasks, str | Task) else iter(task_or_tasks),
        Repeated(None) if text_inputs is None else iter(text_inputs),
        Repeated(None) if regions is None else iter(regions),
        limits.deadlines(),
        limits.cancels(),
    )
    count = 0
    for index, image in enumerate(images):
        count = index + 1
        name, text, region, deadline, cancel = (
            _next(column, name, index) for column, name in zip(columns, _COLUMNS, strict=True)
        )
        try:
            task = tasks.get(name, own)
            progress = limits.progress(index, deadline, cancel)
            yield Request(index, task, image, task.format_input(text, region), progress)
        except FlorenceError as error:
            failures.add([index], error)
    for column, name in zip(columns, _COLUMNS, strict=True):
        if not isinstance(column, Repeated) and next(column, _END) is not _END:
            raise InputError(f"{name} has more entries than the {count} images; give one each")


_COLUMNS = ("tasks", "text_inputs", "regions", "deadline", "cancel")


def _next(column: Iterator[Any], name: str, count: int) -> Any:
    found = next(column, _END)
    if found is _END:
        raise InputError(f"{name} has {count} entries for more images; give one each")
    return found


def check_images(images: object) -> None:
    """Raises InputError for a single image."""
    # a string or an array can be iterated over: without this check each letter or row would be taken for an image
    if isinstance(images, str | bytes | os.PathLike | np.ndarray | PILImage.Image | EncodedImage):
        raise InputError("images must be a list of images; for a single one call run")


def check_arguments(tasks: object, images: object, text_inputs: object, regions: object) -> None:
    """Checks what can be checked before any image is read.

    Raises:
        InputError: A single value was given where a list is needed, or lists differ in length.
    """
    check_images(images)
    for name, column in (("text_inputs", text_inputs), ("regions", regions)):
        if isinstance(column, str):
            raise InputError(f"{name} must be a list with one entry per image, got a string")
    if not isinstance(images, Sized):
        return
    for name, column in (("tasks", tasks), ("text_inputs", text_inputs), ("regions", regions)):
        if isinstance(column, Sized) and not isinstance(column, str | Task) and len(column) != len(images):
            raise InputError(f"{name} has {len(column)} entries for {len(images)} images; give one each")


def check_batch_size(batch_size: object) -> None:
    """Raises InputError for what is not a positive whole number or None."""
    if batch_size is None:
        return
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")


def raise_failure(progress: Sequence[Progress]) -> None:
    """Raises what `on_tokens` has raised while answers were decoded.

    Raises:
        BaseException: The first such error.
    """
    for each in progress:
        if each.failure is not None:
            raise each.failure


def drop_ended(requests: Sequence[Request], answers: list[Answer | None], failures: Failures) -> None:
    """Makes errors of the answers that were ended early, where their call asks for that.

    Args:
        requests: P requests.
        answers: Their P answers; those that become errors are replaced by None.
        failures: Gets the errors.

    Raises:
        FlorenceError: The first such error, unless errors are kept.
    """
    for place, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        if answer is not None and request.progress.raises and isinstance(answer[1].truncated, str):
            answers[place] = None
            failures.add([request.index], stop_error(answer[1].truncated))


def portions(requests: Iterable[Request], size: int) -> Iterator[list[Request]]:
    """Requests in lists of `size`, the last of which may be shorter; reads no further than the list that is due."""
    source = iter(requests)
    while portion := list(islice(source, size)):
        yield portion


class Encodings:
    """Images that were encoded in one portion and occur again in a later one."""

    def __init__(self, requests: Iterable[Request]) -> None:
        """Args:
        requests: All that are known beforehand, or none: then an image is kept until a portion does without it.
        """
        self._left = Counter(image_key(request.image) for request in requests)
        self._kept: dict[Key, tuple[AnyImage, EncodedImage]] = {}

    def find(self, image: AnyImage) -> AnyImage:
        """The encoded image if it is kept, else the image itself."""
        kept = self._kept.get(image_key(image))
        return image if kept is None else kept[1]

    def keep(self, portion: Sequence[Request], seen: Sequence[Seen | None]) -> None:
        """Keeps the images of a portion that are needed again, and drops all others.

        Args:
            portion: Requests that were answered.
            seen: Their images; None for those that failed.
        """
        keys = [image_key(request.image) for request in portion]
        is_known = bool(self._left)
        self._left -= Counter(keys)
        kept = self._kept if is_known else {}
        # the image too: as long as it lives, no other object has its id
        triples = zip(keys, portion, seen, strict=True)
        new = {key: (request.image, each) for key, request, each in triples if isinstance(each, EncodedImage)}
        self._kept = {key: pair for key, pair in {**kept, **new}.items() if not is_known or self._left[key]}


@dataclass(frozen=True)
class Batch:
    """What all portions of a batch share."""

    config: SearchConfig
    preparation: Preparation
    """Of the images that are not encoded."""
    failures: Failures
    encodings: Encodings
