"""The checkpoint's image preprocessing, read from its processor config, and the number of image tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Florence2Config

from florence_onnx.errors import CheckpointError

from .json_files import read_json

MIN_PROMPT_TOKENS = 16
"""Positions that an image must leave to the prompt: the longest prompt without an input has 13 tokens."""
_BICUBIC = 3
_RESCALE_FACTOR = 1 / 255


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes `pixel_values`: resized (the aspect ratio is not kept), rescaled, normalised.

    Example: `Preprocessing((768, 768), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 3, 1 / 255)`
    """

    image_size: tuple[int, int]
    """`(width, height)` in pixels. Both are equal in a checkpoint; an export may be for rectangles, see `Checkpoint.resized`."""
    image_mean: tuple[float, float, float]
    """Mean of the channels R, G, B, in the range 0 to 1."""
    image_std: tuple[float, float, float]
    """Standard deviation of the channels R, G, B, in the range 0 to 1."""
    resample: int
    """Pillow's resampling filter; 3 is bicubic."""
    rescale_factor: float
    """Factor from 0..255 to 0..1."""


def has_preprocessing(folder: Path) -> bool:
    """Whether a folder says how images are prepared."""
    name = "processor_config.json"
    is_own = (folder / "preprocessor_config.json").is_file()
    return is_own or isinstance((read_json(folder, name) or {}).get("image_processor"), dict)


def read_preprocessing(folder: Path) -> Preprocessing:
    """Reads preprocessor_config.json, or processor_config.json, where transformers 5 keeps the same values.

    Raises:
        CheckpointError: Neither file exists, a value is missing, or the config asks for a step that Florence-2 does not
            have.
    """
    name = "preprocessor_config.json"
    values = read_json(folder, name)
    if values is None:
        name = "processor_config.json"
        values = (read_json(folder, name) or {}).get("image_processor")
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{folder} has no preprocessor_config.json (nor a processor_config.json with an image_processor); "
            "take it from the base model: --processor microsoft/Florence-2-base"
        )
    _check_steps(name, values)
    side = _side(name, values)
    return Preprocessing(
        (side, side),
        _channels(name, values, "image_mean"),
        _channels(name, values, "image_std"),
        _BICUBIC,
        _RESCALE_FACTOR,
    )


def _check_steps(name: str, values: dict[str, Any]) -> None:
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not values.get(step, True):
            raise CheckpointError(f"{name}: {step} is false; Florence-2's preprocessing needs it")
    if values.get("resample", _BICUBIC) != _BICUBIC:
        raise CheckpointError(f"{name}: resample is {values['resample']}; Florence-2's is {_BICUBIC} (bicubic)")
    if abs(values.get("rescale_factor", _RESCALE_FACTOR) - _RESCALE_FACTOR) > 1e-9:
        raise CheckpointError(f"{name}: rescale_factor is {values['rescale_factor']}; Florence-2's is 1/255")
    if values.get("do_center_crop") and values.get("crop_size") != values.get("size"):
        raise CheckpointError(f"{name}: do_center_crop with a crop_size other than size is not supported")


def _side(name: str, values: dict[str, Any]) -> int:
    size = values.get("size")
    if isinstance(size, int):
        return size
    if isinstance(size, dict) and isinstance(size.get("height"), int) and size.get("height") == size.get("width"):
        return int(size["height"])
    raise CheckpointError(
        f"{name}: size is {size}; Florence-2 takes square images, e.g. {{'height': 768, 'width': 768}}"
    )


def _channels(name: str, values: dict[str, Any], key: str) -> tuple[float, float, float]:
    numbers = values.get(key)
    if not isinstance(numbers, list | tuple) or len(numbers) != 3:
        raise CheckpointError(f"{name}: {key} is {numbers}; expected three numbers")
    red, green, blue = (float(number) for number in numbers)
    return red, green, blue


def count_image_tokens(config: Florence2Config, image_size: tuple[int, int]) -> int:
    """Counts the image tokens of an image: the grid cells of the last vision stage, plus one for their mean.

    Args:
        config: In transformers' native layout.
        image_size: `(width, height)` in pixels.

    Raises:
        CheckpointError: The grid is empty or larger than the position embedding.
    """
    columns, rows = (_count_cells(config, side) for side in image_size)
    return columns * rows + 1


def check_image_size(config: Florence2Config, image_size: tuple[int, int]) -> None:
    """Checks whether a model can read images of a size `(width, height)` in pixels that is not its own.

    Raises:
        CheckpointError: Its position embedding is too small, or the image leaves the text encoder no positions for a prompt.
    """
    count = count_image_tokens(config, image_size)
    room = config.text_config.max_position_embeddings - count
    if room < MIN_PROMPT_TOKENS:
        raise CheckpointError(
            f"images of {image_size[0]} x {image_size[1]} pixels give {count} image tokens; of the text encoder's "
            f"{config.text_config.max_position_embeddings} positions they leave {max(room, 0)} for a prompt, which needs "
            f"{MIN_PROMPT_TOKENS}: choose a smaller size"
        )


def _count_cells(config: Florence2Config, side: int) -> int:
    """Cells of the last vision stage along one side of an image, which has one position embedding for each."""
    vision, cells = config.vision_config, side
    for kernel, stride, padding in zip(vision.patch_size, vision.patch_stride, vision.patch_padding, strict=True):
        cells = (cells + 2 * padding - kernel) // stride + 1
    if not 0 < cells <= vision.max_position_embeddings:
        raise CheckpointError(
            f"images of {side} pixels give {cells} cells a side; the checkpoint has positions for 1 to "
            f"{vision.max_position_embeddings}: choose a size that fits, or check `size` in preprocessor_config.json"
        )
    return cells
