"""How an answer is followed while it grows, and how it is ended early: `Deadline`, `Cancel`, and `Progress` for one answer.

Searches call `Progress.after_step` after every decode step, on the host and in continuous batching alike. So a call ends
within one step of its deadline, and nobody but the search has to know of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

from florence_onnx.errors import CancelledError, DeadlineError, FlorenceError, InputError

StopReason = Literal["deadline", "cancelled"]
"""Why a caller ended an answer early."""
Truncated: TypeAlias = bool | StopReason
"""Whether an answer is incomplete: True where the token limit cut it off, else the reason, which is true as well."""
Clock = Callable[[], float]
OnTokens = Callable[[Sequence[int], Any], None]
"""Takes the tokens that are certain so far, from the decoder start token on, and the image: an `EncodedImage`."""
OnDeadline = Literal["return", "raise"]


class Cancel:
    """Ends calls from another thread: pass it as `cancel=` to any number of them, then call `cancel`."""

    def __init__(self) -> None:
        self._is_cancelled = False

    def cancel(self) -> None:
        """Ends every call that has this token, within one decode step; may be called from any thread, and again."""
        self._is_cancelled = True

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._is_cancelled


class Deadline:
    """A time at which calls end. A number of seconds as `deadline=` makes one at the call; one object may serve several."""

    def __init__(self, seconds: float, clock: Clock = time.monotonic) -> None:
        """Args:
        seconds: From now on.
        clock: Returns the present time in seconds.

        Raises:
            InputError: `seconds` is not a number of at least 0.
        """
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
            raise InputError(f"deadline must be a number of seconds, at least 0, got {seconds!r}")
        self._clock = clock
        self._end = clock() + seconds

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline; negative behind it."""
        return self._end - self._clock()


class Progress:
    """One answer while it grows: who is told of its tokens, and what ends it early."""

    def __init__(
        self,
        deadline: Deadline | None = None,
        cancel: Cancel | None = None,
        on_deadline: OnDeadline = "return",
        on_tokens: OnTokens | None = None,
    ) -> None:
        """Args:
        deadline: When the answer ends.
        cancel: What ends it.
        on_deadline: Whether an answer that was ended early is returned as far as it goes, or an error.
        on_tokens: Called after every decode step in the thread that decodes.
        """
        self._deadline = deadline
        self._cancel = cancel
        self._on_tokens = on_tokens
        self._reason: StopReason | None = None
        self.raises = on_deadline == "raise"
        self.image: Any = None
        """The image that the answer is about, once it is encoded."""
        self.failure: BaseException | None = None
        """What `on_tokens` raised, which ended the answer. The decoding thread must survive it: it serves other callers."""

    def reason(self, seconds: float = 0.0) -> StopReason | None:
        """Why the answer has to end now, or None; once there is a reason it stays.

        Args:
            seconds: What comes next takes at least so long: without that much time left it is not worth beginning.
        """
        if self._reason is None and self._cancel is not None and self._cancel.is_cancelled:
            self._reason = "cancelled"
        if self._reason is None and self._deadline is not None and self._deadline.seconds_left <= seconds:
            self._reason = "deadline"
        return self._reason

    def after_step(self, certain: Callable[[], Sequence[int]]) -> StopReason | None:
        """Reports a decode step.

        Args:
            certain: Returns the tokens that no later step can take back; called only if somebody asks for them.

        Returns:
            Why the answer has to end with the tokens that it has, or None.
        """
        if self._on_tokens is not None and self.failure is None:
            try:
                self._on_tokens(certain(), self.image)
            except BaseException as error:  # noqa: BLE001 - raised in the caller's thread, which reads `failure`
                self.failure, self._reason = error, "cancelled"
        return self.reason()


def stop_error(reason: StopReason) -> FlorenceError:
    """The error of an answer that was ended early."""
    if reason == "deadline":
        return DeadlineError('the deadline has passed; on_deadline="return" returns the answer so far')
    return CancelledError('the call was cancelled; on_deadline="return" returns the answer so far')


def first_reason(found: Iterable[Truncated]) -> Truncated:
    """What has cut any of some answers off; a caller's reason comes before the token limit."""
    all_found = set(found)
    reasons: tuple[Truncated, ...] = ("cancelled", "deadline", True)
    return next((reason for reason in reasons if reason in all_found), False)
