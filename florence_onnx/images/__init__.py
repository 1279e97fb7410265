"""Bytes or an address to pixels.

In: a path, bytes, a file object, a PIL image, an array, an `http(s)` URL or a `data:` URI. Out: an upright RGB image
(`decoding.load`), and from it the model's `pixel_values` (`preprocessing.preprocess`). `opening` reads headers within
limits, with a module for what each format can hide; `pixels` decodes; `decoder_processes` does both in other processes.
`download` fetches URLs with `connection` and `addresses`, which filter those that untrusted callers send. Called by
`inference`, `model`, `fal` and the export; knows nothing of tasks or models.
"""
