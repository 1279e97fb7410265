"""`florence_onnx.images.image` under the name that users import."""

from florence_onnx.images.image import ImageInput, load, preprocess

__all__ = ["ImageInput", "load", "preprocess"]
