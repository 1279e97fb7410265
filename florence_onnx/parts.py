"""The parts of an answer while it is generated: its text, and each box, quad, outline and word once it is complete.

Called by `streams` and `server`. In: the tokens that are certain so far, as `Florence2.run_batch` reports them to `on_tokens`.
Out: `TextPart` and `ItemPart`, which together are the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from florence_onnx.answers.placed import to_source
from florence_onnx.answers.settled import Item, items_of, settled
from florence_onnx.errors import ProviderError
from florence_onnx.prediction import EncodedImage, Prediction
from florence_onnx.tasks import Task

_REPLACEMENT = "�"
"""What bytes decode to that are no UTF-8 yet: a token may end in the middle of a character."""


@dataclass(frozen=True)
class TextPart:
    """More of the generated text; all of them joined are `Prediction.text`."""

    text: str
    """With special and location tokens; never a part of a character."""
    token_ids: tuple[int, ...]
    """The tokens of the text; all of them joined are `Prediction.token_ids`."""


@dataclass(frozen=True)
class ItemPart:
    """An item of the answer that is complete; all of them in order are those of `Prediction.results`."""

    item: Item
    """A box, quad box or outline in pixels, without a score; or a word with the white space before it."""
    index: int
    """Place among the items of the answer, from 0."""


Part: TypeAlias = "TextPart | ItemPart"


class PartReader:
    """Makes the parts of one answer out of its tokens."""

    def __init__(self, task: Task[Any], decode: Callable[[Sequence[int]], str]) -> None:
        """Args:
        task: Whose answer it is.
        decode: Turns token ids into text.
        """
        self._task = task
        self._decode = decode
        self._num_tokens = 0
        self._pending: list[int] = []  # tokens whose text ends within a character
        self._text = ""
        self._items: list[Item] = []

    def read(self, token_ids: Sequence[int], image: EncodedImage) -> Iterator[Part]:
        """Yields what is new.

        Args:
            token_ids: All tokens that are certain, from the decoder start token on. Fewer than before change nothing: decoding
                has started over.
            image: The image that the answer is about.
        """
        self._pending += token_ids[self._num_tokens :]
        self._num_tokens = max(self._num_tokens, len(token_ids))
        text = self._decode(self._pending) if self._pending else ""
        if not text or text.endswith(_REPLACEMENT):
            return
        yield self._take(text)
        yield from self._take_items(self._settled(image))

    def _settled(self, image: EncodedImage) -> Sequence[Item]:
        if image.placement is None or not image.is_padded:
            return settled(self._task.parser, self._text, image.size)
        found = settled(self._task.parser, self._text, image.placement.image_size)
        return [to_source(item, image.placement) for item in found]

    def finish(self, prediction: Prediction[Any]) -> Iterator[Part]:
        """Yields what is left.

        Raises:
            ProviderError: The answer is another one than the parts so far: decoding has started over for want of memory, and
                equally likely tokens were chosen otherwise.
        """
        items = items_of(prediction.results)
        if not prediction.text.startswith(self._text) or list(items[: len(self._items)]) != self._items:
            raise ProviderError(
                "decoding had to start over and gave another answer; ask again, or use run instead of stream"
            )
        self._pending += prediction.token_ids[self._num_tokens :]
        if self._pending:
            yield self._take(prediction.text[len(self._text) :])
        yield from self._take_items(items)

    def _take(self, text: str) -> TextPart:
        part = TextPart(text, tuple(self._pending))
        self._pending = []
        self._text += text
        return part

    def _take_items(self, items: Sequence[Item]) -> Iterator[ItemPart]:
        for item in items[len(self._items) :]:
            self._items.append(item)
            yield ItemPart(item, len(self._items) - 1)
