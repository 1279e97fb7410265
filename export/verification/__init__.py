"""Comparing a bundle with its checkpoint, and bundles with one another.

In: a checkpoint or an fp32 bundle as the reference, and bundles. Out: the errors of the graphs and the share of equal
tokens, which every export checks (`checks`); or figures task by task, which `florence-onnx-export verify` prints
(`comparison`, `report`).

    reference    transformers' own `generate` and logits
    checks       bounds on the graphs and on the tokens, for every export
    photograph   the image that is used where the user gives none
    agreement    the figures: tokens, words, boxes, masks, logits. Pure functions
    questions    images, and a prompt of every task for each
    answerers    models behind one interface: a bundle on ONNX Runtime, a checkpoint in transformers
    comparison   every question to every model
    report       figures as tables and JSON, and thresholds on them
"""
