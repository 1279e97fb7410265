"""Whether a bundle answers as its checkpoint does, and how much two bundles agree.

In: a checkpoint or a bundle as reference, and bundles. Out: the tokens that agree (`verify`, at every export), or a
report task by task (`answering`, `agreement`, `agreement_report`: `florence-onnx-export verify`). `reference` is
transformers' own `generate`.
"""
