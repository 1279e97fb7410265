"""Loading a checkpoint into transformers' native Florence-2 class.

In: a folder or a hub id, in transformers' native layout or in Microsoft's. Out: a `Checkpoint` with the PyTorch model,
the tokenizer, and the preprocessing and generation settings (`checkpoint.load_checkpoint`). No code of the checkpoint
is run. Every other room of `export` may import this one.

    folder          a local folder, or a snapshot downloaded from the hub
    json_files      the configs
    weight_files    the tensors under the names that the files give them
    microsoft       the names and the config of Microsoft's layout, in terms of the native one
    weights         stored names -> native names; every weight is accounted for
    tokenizer       BART's byte-level BPE with Florence-2's 1024 added tokens
    generation      the defaults that the checkpoint's own `generate` would use
    preprocessing   how an image becomes `pixel_values`
    sizes           what a bundle states about the model, from the config
    quantized       weights that are no floats any more, by the tool that made them so
    adapters        PEFT's adapters, merged by PEFT
    original        the checkpoint as transformers itself loads it, which an export is verified against
    checkpoint      all of the above together
    diagnosis       the same for `doctor`: all that is peculiar about a checkpoint, in one table
"""
