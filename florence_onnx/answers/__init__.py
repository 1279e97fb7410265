"""Generated text to geometry, labels and drawings.

In: the text that the model generated, with its location tokens, and the image's `(width, height)`. Out: the
dataclasses of `results`, which have the shapes of fal's JSON (parsed by `postprocess`, coordinates from `locations`);
the same drawn on the image (`draw`); and how much two answers agree (`matching`). Called by `tasks`, `prediction`, the
comparison with fal and the export; knows nothing of models or token ids.
"""
