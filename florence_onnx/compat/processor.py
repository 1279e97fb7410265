"""transformers' Florence-2 processor: prompts to ids, images to pixels, ids to text, text to dicts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage

from florence_onnx import tasks
from florence_onnx.answers.postprocess import description_with_bboxes_or_polygons, pure_text
from florence_onnx.answers.reference_dict import reference_dict
from florence_onnx.bundles import bundle as bundles
from florence_onnx.bundles import hub
from florence_onnx.bundles.bundle import Bundle
from florence_onnx.compat.arrays import BatchFeature, as_array
from florence_onnx.compat.names import loading_arguments, resolve_name
from florence_onnx.errors import InputError
from florence_onnx.images import preprocessing
from florence_onnx.loading import load_tokenizer
from florence_onnx.prompts import expand

_SIZE_ARGUMENTS = ("do_resize", "do_normalize", "do_rescale", "do_center_crop")


class Florence2Processor:
    """Called as transformers' class of that name, for its Florence-2 checkpoints and for Microsoft's.

    `input_ids` are those of the prompt alone, as Microsoft's processor makes them: the model puts the image in front by itself.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Args: bundle, of whose model prompts and images are prepared."""
        self._sizes = bundle.sizes
        self.tokenizer = load_tokenizer(bundle)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **arguments: Any) -> Florence2Processor:
        """Loads the tokenizer and the sizes of a bundle, not its graphs.

        Args:
            name: A bundle directory, a hub repository, `"demo"`, or a published checkpoint such as
                `microsoft/Florence-2-base`, for which its published ONNX export is taken.
            arguments: `precision`, `revision`, `cache_dir`; transformers' own (`trust_remote_code`, …) do nothing.

        Raises:
            BundleError: There is none.
            InputError: An argument is unknown.
        """
        given = loading_arguments(arguments)
        wanted = {key: given[key] for key in ("precision", "revision", "cache_dir") if key in given}
        preferred = bundles.PREFERRED_PRECISIONS
        return cls(hub.resolve(resolve_name(name), preferred=preferred, **wanted))

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        return_tensors: str | None = None,
        **arguments: Any,
    ) -> BatchFeature:
        """Prepares prompts and images.

        Args:
            text: A task token, with its input behind it where the task takes one, or any other prompt; or a list of them.
            images: A PIL image, an `(H, W, 3)` uint8 array, or a list of either; as many as prompts.
            return_tensors: Whatever it says, arrays are returned.
            arguments: `padding` and `truncation` do nothing: prompts are padded to the longest and never cut. Preprocessing cannot
                be changed: it is the model's.

        Returns:
            `input_ids` and `attention_mask` `(B, T)` int64, and `pixel_values` `(B, 3, H, W)` float32.

        Raises:
            InputError: Text and images differ in number, or an argument would change the preprocessing.
            ImageError: An image is of another kind.
        """
        self._check_arguments(arguments)
        if images is None and text is None:
            raise InputError("the processor needs text, images or both")
        given = _as_list(images) if images is not None else []
        prompts = [""] * len(given) if text is None else [text] if isinstance(text, str) else list(text)
        if given and len(given) != len(prompts):
            raise InputError(f"there are {len(given)} images and {len(prompts)} prompts; give one prompt an image")
        ids, mask = self.tokenizer.encode([expand(prompt) for prompt in prompts])
        found = BatchFeature({"input_ids": as_array(ids, np.int64), "attention_mask": as_array(mask, np.int64)})
        if given:
            found["pixel_values"] = as_array(np.concatenate([self._pixels(image) for image in given]), np.float32)
        return found

    def _pixels(self, image: PILImage.Image | npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        sizes = self._sizes
        return preprocessing.preprocess(image, size=sizes.image_size, mean=sizes.image_mean, std=sizes.image_std)

    def _check_arguments(self, arguments: dict[str, Any]) -> None:
        changed = [
            name for name in _SIZE_ARGUMENTS if name in arguments and arguments[name] is not (name != "do_center_crop")
        ]
        if changed:
            raise InputError(
                f"{', '.join(changed)} cannot be changed: the model reads images of {self._sizes.image_size} pixels"
            )
        known = {*_SIZE_ARGUMENTS, "padding", "truncation", "max_length", "add_special_tokens", "padding_side"}
        if unknown := set(arguments) - known:
            raise InputError(f"the processor does not take {', '.join(sorted(unknown))}")

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **_: Any) -> list[str]:
        """Text of generated ids `(B, L)`, padding included, as transformers' tokenizer gives it."""
        return [self.decode(sequence, skip_special_tokens) for sequence in np.asarray(sequences)]

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **_: Any) -> str:
        """Text of generated ids `(L,)`."""
        return self.tokenizer.decode(np.asarray(token_ids).tolist(), skip_special_tokens=skip_special_tokens)

    def post_process_generation(
        self,
        text: str | None = None,
        sequence: Any = None,
        task: str | None = None,
        image_size: tuple[int, int] | None = None,
        *,
        integers: bool = True,
    ) -> dict[str, Any]:
        """Text to the dict of a task.

        Args:
            text: Generated text.
            sequence: Generated ids instead.
            task: A task token; one that is unknown is read as text, as transformers does.
            image_size: (width, height) of the image in pixels.
            integers: Whether coordinates are truncated, as transformers does; Microsoft's code does not.

        Raises:
            InputError: The task, or the size that it needs, is missing, or there are both text and ids, or neither.
        """
        if task is None or (text is None) == (sequence is None):
            raise InputError("post_process_generation needs a task, and either text or sequence")
        said = self.decode(sequence) if text is None else text
        known = next((each for each in tasks.TASKS.values() if each.token == task), None)
        if known is None or known.parser is pure_text:
            return {task: pure_text(said, (1, 1))}
        if image_size is None:
            raise InputError(f"post_process_generation needs image_size, (width, height) in pixels, for {task}")
        size = (int(image_size[0]), int(image_size[1]))
        with_polygons = known.parser is description_with_bboxes_or_polygons
        return {task: reference_dict(known.parser(said, size), with_polygons=with_polygons, integers=integers)}


def _as_list(images: Any) -> list[Any]:
    if isinstance(images, PILImage.Image) or (isinstance(images, np.ndarray) and images.ndim == 3):
        return [images]
    return list(images)
