"""`florence_onnx.answers.postprocess` under the name that users import."""

from florence_onnx.answers.postprocess import parse, pure_text

__all__ = ["parse", "pure_text"]
