"""Logits to tokens.

In: the scores of a decoder call (`scores`: all logits on the host, or the top-k that a device has found) and a
`SearchConfig`. Out: which token each row is fed next and, at the end, one `GeneratedSequence` per prompt.
`greedy_search` and `beam_search` are the two searches, `generate.drive` is the loop between a search and a decoder
session. Called by `inference` and `model`; knows no text and no ONNX.
"""
