"""The interface of a runtime that is compared."""

from __future__ import annotations

from typing import Any, Protocol

from benchmarks.cpu.jobs import Job, Prompt


class UnavailableError(Exception):
    """The peer cannot run here, or its times would be meaningless; the message says why."""


class Runner(Protocol):
    """A runtime, in a process of its own. The constructor only stores the `Job`."""

    keeps_features: bool
    """Whether a second task can be run without running the vision encoder again."""

    def load(self) -> None:
        """Imports the runtime and loads the model.

        Raises:
            UnavailableError: It cannot run here.
            ImportError: It is not installed.
        """

    def preprocess(self, image: str) -> Any:
        """Returns the pixel values of an image file."""

    def vision(self, pixel_values: Any) -> Any:
        """Returns the image features."""

    def encode_text(self, features: Any, prompt: Prompt) -> None:
        """Runs the text encoder and discards its output."""

    def answer(self, features: Any, prompt: Prompt, num_beams: int, num_tokens: int) -> list[int]:
        """Returns the generated token ids after the decoder start token, exactly `num_tokens` of them."""

    def describe(self) -> dict[str, Any]:
        """Returns `versions` by library, `notes` for the report, and `precision` if it is not the requested one."""


class Factory(Protocol):
    """The signature of `create`, which every module of this package must have."""

    def __call__(self, job: Job) -> Runner: ...
