"""Exporting a PyTorch checkpoint of Florence-2 to ONNX. Needs the extra `[export]`.

A room imports only rooms that stand before it (`tests/export/test_rooms.py`):

    checkpoints       a folder or hub id -> a transformers model with tokenizer, preprocessing and generation settings
    graphs            the model -> three fp32 graphs
    precisions        fp32 graphs -> fp16, int8, int4
    verification      graphs and answers against transformers; bundles against one another
    bundles           all of the above -> a bundle directory
    transformers_js   the same for the layout of transformers.js
    publishing        a bundle -> a model card and a commit on the hub
    published         published checkpoints -> rows: do they answer as transformers does, and as was published
    demo              the tiny model that comes with the package: its scenes, training and evaluation
    commands          the command line

The package has two names, `export` in a checkout and `florence_onnx.export` when installed, so imports inside it are
relative.
"""

from florence_onnx.runtime import telemetry  # noqa: F401  # ONNX Runtime must not be imported before this
