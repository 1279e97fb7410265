"""The built-in demo model: synthetic scenes with ground truth, a tiny Florence-2 trained on them, and its evaluation.

`scenes`, `questions` and `metrics` need numpy and Pillow only; the rest needs torch and transformers. `train`,
`evaluate`, `finalize`, `samples` and `tokenizer` are commands: `python -m export.demo.train --out DIR`.
"""
