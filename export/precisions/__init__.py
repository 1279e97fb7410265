"""Converting fp32 graphs to fp16, int8 and int4.

In: the fp32 `.onnx` files of an export. Out: the same files in another precision. `recipes.PRECISIONS` says which
conversion each graph gets; `fp16` and `quantization` are the conversions.
"""
