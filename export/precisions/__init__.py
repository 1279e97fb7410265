"""fp32 graphs to fp16, int8 and int4.

In: the fp32 graphs of an export. Out: the same graphs in another precision (`optimize.PRECISIONS`; `quantize` has the
arithmetic of integers).
"""
