"""A checkpoint on disk or on the hub to a transformers model with its weights.

In: a folder or a repository's name, in transformers' native layout or Microsoft's. Out: a `Checkpoint`: the PyTorch
model, its tokenizer, preprocessing and generation settings (`checkpoint.load_checkpoint`). No code of the checkpoint
is run.
"""
