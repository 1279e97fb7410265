"""A checkpoint to a verified bundle on disk.

In: a `Checkpoint`, precisions and images to verify with. Out: a bundle directory, or nothing at all where a check
fails (`writer.export_bundles`); the memory that its graphs need (`memory`), its weights stored once (`weights`),
its TensorRT engines (`tensorrt`).
"""
