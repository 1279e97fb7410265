"""Large images, tile by tile: what a model that reads 768 pixels would miss in an image of 3,000.

In: an image and `Tiles`. Out: one answer about the whole image, in which nothing that lies on a seam occurs twice. Called
by `model` and `detecting`, which hand over the model; knows no graphs and no tokens.

supervision's `InferenceSlicer` was looked at and is not used: it hands slices to a callback and merges what comes back by
NMS or by uniting boxes, so that it has no use for a text line of which either tile reads a half, loses the texts of quads
and the outlines of polygons, and would make supervision a requirement of `run`. A tile's answer can still be given to it:
`model.run(…).to_supervision()` is a callback's return value.
"""
