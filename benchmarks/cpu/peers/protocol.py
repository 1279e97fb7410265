"""What a runtime must do to be compared."""

from __future__ import annotations

from typing import Any, Protocol

from benchmarks.cpu.jobs import Job, Prompt


class UnavailableError(Exception):
    """The peer cannot run here, or it would make no sense; the message says why."""


class Runner(Protocol):
    """A runtime in the process that was started for it. Its constructor only takes the `Job`."""

    keeps_features: bool
    """Whether a second task can be asked without running the vision encoder again."""

    def load(self) -> None:
        """Imports the runtime and loads the model.

        Raises:
            UnavailableError: It cannot run here.
            ImportError: It is not installed.
        """

    def preprocess(self, image: str) -> Any:
        """Pixel values of an image file."""

    def vision(self, pixel_values: Any) -> Any:
        """Image features."""

    def encode_text(self, features: Any, prompt: Prompt) -> None:
        """Runs the text encoder and forgets what it gave."""

    def answer(self, features: Any, prompt: Prompt, num_beams: int, num_tokens: int) -> list[int]:
        """The generated ids after the decoder start token, exactly `num_tokens` of them."""

    def describe(self) -> dict[str, Any]:
        """`versions` by library, `notes` (what a reader should know), `precision` if it is not what was asked for."""


class Factory(Protocol):
    """The one name that a module of this package must have: `create`."""

    def __call__(self, job: Job) -> Runner: ...
