"""The vision encoders of a bundle, one for each image size; each is loaded when an image is first encoded with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from florence_onnx import forks
from florence_onnx.bundles.bundle import Bundle
from florence_onnx.errors import InputError
from florence_onnx.runtime.engine import Engine

E = TypeVar("E", bound=Engine)


class VisionEncoders(Generic[E]):
    """Loaded vision encoders by image size. May be used from several threads at once."""

    def __init__(self, bundle: Bundle, engine: E, open_engine: Callable[[Bundle], E] | None = None) -> None:
        """Args:
        bundle: The bundle; `engine` is for its `sizes.image_size`.
        engine: The loaded vision encoder of the default size.
        open_engine: Loads the vision encoder of a bundle for its `sizes.image_size`; None where only `engine` can be used.
        """
        self._bundle = bundle
        self._open_engine = open_engine
        self._engines = {bundle.sizes.image_size: engine}
        self._lock = forks.Lock()

    @property
    def default(self) -> E:
        """The vision encoder of the default size."""
        return self._engines[self._bundle.sizes.image_size]

    @property
    def loaded(self) -> tuple[tuple[int, int], ...]:
        """The sizes `(width, height)` in pixels whose vision encoders are loaded."""
        return tuple(self._engines)

    def num_image_tokens(self, image_size: tuple[int, int]) -> int:
        """Image tokens N at a size; errors as for `get`."""
        return self._bundle.resized(image_size).sizes.num_image_tokens

    def get(self, image_size: tuple[int, int]) -> E:
        """The vision encoder for a size, loaded now if it was not.

        Args:
            image_size: One of `Bundle.image_sizes`.

        Raises:
            BundleError: Its file is missing or damaged.
            InputError: There is none for that size.
            ProviderError: It does not load on the device.
        """
        wanted = self._bundle.resized(image_size)
        with self._lock:
            if image_size not in self._engines:
                if self._open_engine is None:
                    raise InputError(
                        f"this model was loaded for images of {self._bundle.sizes.image_size} pixels only; load it "
                        f"another time with image_size={image_size}"
                    )
                self._engines[image_size] = self._open_engine(wanted)
            return self._engines[image_size]
