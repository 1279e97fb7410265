"""Public names for parsing generated text; the code is in `florence_onnx.answers` and `florence_onnx.tasks`."""

from florence_onnx.answers.postprocess import pure_text
from florence_onnx.tasks import parse

__all__ = ["parse", "pure_text"]
