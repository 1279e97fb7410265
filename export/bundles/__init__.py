"""Writing a verified bundle.

In: a `Checkpoint`, precisions, and images to verify on. Out: a bundle directory, or nothing if a check fails
(`writer.export_bundles`).

    directories   an output directory appears only when it is complete
    weights       the weights of all graphs in one file, each stored once
    memory        the memory that each graph needs
    tensorrt      TensorRT engines for a bundle
    writer        all of it together
"""
