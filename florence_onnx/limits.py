"""What may end the answers of a call early, and who follows them: `deadline`, `cancel`, `on_deadline` and `on_tokens`.

Called by `batches` and `model`. In: those arguments, each one value for all images or one an image. Out: a `Progress` an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from florence_onnx.errors import InputError
from florence_onnx.generation.progress import Cancel, Deadline, OnDeadline, Progress

Seconds: TypeAlias = "float | Deadline"
"""Seconds from the call on, or a `Deadline` that was made before."""
OnIndexedTokens: TypeAlias = Callable[[int, Sequence[int], Any], None]
"""Takes an image's index, the tokens of its answer that are certain so far, and the image: an `EncodedImage`."""


class Repeated(Iterator[Any]):
    """One value for every image."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __next__(self) -> Any:
        return self._value


@dataclass(frozen=True)
class Limits:
    """The arguments of a call of these names; make it when the call begins, as seconds count from then.

    Raises:
        InputError: An argument is of another type or out of range.
    """

    deadline: Seconds | Iterable[Seconds | None] | None = None
    """Of all answers, or one an image."""
    cancel: Cancel | Iterable[Cancel | None] | None = None
    """Of all answers, or one an image."""
    on_deadline: OnDeadline = "return"
    """Whether an answer that was ended early is returned as far as it goes, or an error."""
    on_tokens: OnIndexedTokens | None = None
    """Called after every decode step for each answer in flight."""
    _begin: Deadline = field(default_factory=lambda: Deadline(0))

    def __post_init__(self) -> None:
        if self.on_deadline not in ("return", "raise"):
            raise InputError(f'on_deadline must be "return" or "raise", got {self.on_deadline!r}')
        for name, value, single in (("deadline", self.deadline, Deadline), ("cancel", self.cancel, Cancel)):
            if isinstance(value, str) or not isinstance(value, single | Iterable | float | int | None):
                raise InputError(f"{name} must be {_ALLOWED[name]}, or a list with one entry per image, got {value!r}")
        if not isinstance(self.deadline, Iterable):  # one moment for all, and a wrong one fails at once
            object.__setattr__(self, "deadline", self._to_deadline(self.deadline))
        if not isinstance(self.cancel, Iterable):
            _check_cancel(self.cancel)

    @property
    def shared_arguments(self) -> dict[str, Any]:
        """What may end the answers, as arguments of a further call: the same moment, not as many seconds again."""
        return {"deadline": self.deadline, "cancel": self.cancel, "on_deadline": self.on_deadline}

    def deadlines(self) -> Iterator[Any]:
        """The deadline of each image."""
        return iter(self.deadline) if isinstance(self.deadline, Iterable) else Repeated(self.deadline)

    def cancels(self) -> Iterator[Any]:
        """The token of each image."""
        return iter(self.cancel) if isinstance(self.cancel, Iterable) else Repeated(self.cancel)

    def first_progress(self) -> Progress:
        """What may end the answer about the first image."""
        return self.progress(0, next(self.deadlines(), None), next(self.cancels(), None))

    def progress(self, index: int, deadline: Seconds | None, cancel: Cancel | None) -> Progress:
        """What follows and may end one answer.

        Args:
            index: Of its image.
            deadline: As `deadlines` has it.
            cancel: As `cancels` has it.

        Raises:
            InputError: One of them is something else.
        """
        _check_cancel(cancel)
        tell = self.on_tokens
        return Progress(
            self._to_deadline(deadline),
            cancel,
            self.on_deadline,
            None if tell is None else lambda tokens, image: tell(index, tokens, image),
        )

    def _to_deadline(self, value: Seconds | None) -> Deadline | None:
        if value is None or isinstance(value, Deadline):
            return value
        elapsed = -self._begin.seconds_left
        made = Deadline(value)  # checks it
        return Deadline(max(0.0, value - elapsed)) if elapsed else made


_ALLOWED = {"deadline": "a number of seconds or a Deadline", "cancel": "a Cancel"}


def _check_cancel(value: object) -> None:
    if value is not None and not isinstance(value, Cancel):
        raise InputError(f"cancel must be a Cancel, got {value!r}")
