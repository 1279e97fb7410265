"""Writing a checkpoint in the layout of transformers.js.

In: a `Checkpoint`. Out: a directory laid out like `onnx-community/Florence-2-*`, verified as every export is
(`writer.export_transformers_js`).

    modules   the torch modules that are traced, besides the vision encoder
    plans     names, example inputs and dynamic axes of the graphs
    configs   the JSON files
    writer    all of it together
"""
