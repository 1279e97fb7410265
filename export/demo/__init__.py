"""The built-in demo model: drawn scenes with exact truth, a tiny Florence-2 trained on them, and its evaluation.

`scenes`, `answers` and `metrics` need numpy and Pillow only; the rest needs torch and transformers.
"""
