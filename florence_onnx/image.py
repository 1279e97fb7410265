"""Public names for loading and preprocessing images; the code is in `florence_onnx.images`."""

from florence_onnx.images.decoding import ImageInput, load
from florence_onnx.images.preprocessing import preprocess

__all__ = ["ImageInput", "load", "preprocess"]
