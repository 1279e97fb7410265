"""A checkpoint in the layout that transformers.js reads.

In: a `Checkpoint`. Out: a directory as `onnx-community/Florence-2-*` have it, verified as every export is
(`export.export_transformers_js`).
"""
