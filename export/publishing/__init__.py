"""Publishing a bundle on the model hub.

In: a bundle directory of either layout, or one with several bundles. Out: a commit on the hub with the bundle's files and
a model card. Needs no PyTorch; `florence-onnx pull` is the way back.

    card    the model card: what the bundle is, how well it agrees with its checkpoint, how to load it
    push    what is pushed, what is refused, and the errors of the hub
"""
