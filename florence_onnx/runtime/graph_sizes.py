"""Whether graphs have the shapes that a bundle's description states.

A wrong size would show late: as an error of ONNX Runtime at the first image, or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from florence_onnx.bundles.bundle import DESCRIPTION, Bundle, ModelSizes
from florence_onnx.errors import BundleFormatError

Shape = Sequence[int | str | None]


class Shaped(Protocol):
    """A loaded graph, as far as it matters here."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of each input and output by name; an axis without a fixed size is its name or None."""


def check(bundle: Bundle, graphs: Mapping[str, Shaped]) -> None:
    """Compares all fixed axes of a bundle's graphs with its sizes.

    Args:
        bundle: The model on disk.
        graphs: Its loaded graphs by name, as `Bundle.stages` names them.

    Raises:
        BundleFormatError: A graph takes or returns another size. The message has both.
    """
    for graph, loaded in graphs.items():
        for tensor, axes in _stated(bundle.sizes).items():
            for axis, (key, stated) in axes.items():
                found = loaded.shapes[tensor][axis] if tensor in loaded.shapes else None
                if isinstance(found, int) and found != stated:
                    raise BundleFormatError(
                        f"{_stating(bundle)} says {key} {stated}, but {bundle.graph(graph)} has {found} there "
                        f"(axis {axis} of {tensor}): {key} can only be {found}; export or download the bundle again"
                    )


def _stating(bundle: Bundle) -> Path:
    """The file that states the sizes."""
    return bundle.path / (DESCRIPTION if bundle.layout == "florence_onnx" else "config.json")


def _stated(sizes: ModelSizes) -> dict[str, dict[int, tuple[str, int]]]:
    """Key and size of each axis that the description states, by tensor: `pixel_values` is (B, 3, H, W)."""
    width, height = sizes.image_size
    cache = {1: ("decoder_heads", sizes.decoder_heads), 3: ("head_dim", sizes.head_dim)}
    return {
        "pixel_values": {2: ("image_size", height), 3: ("image_size", width)},
        "image_features": {
            1: ("num_image_tokens", sizes.num_image_tokens),
            2: ("decoder_heads * head_dim", sizes.width),
        },
        "past_key_values.0.key": cache,
        "past_key_values.0.decoder.key": cache,
        "logits": {2: ("vocab_size", sizes.vocab_size)},
    }
