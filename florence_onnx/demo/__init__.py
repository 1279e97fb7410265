"""The built-in demo model: a bundle, sample pictures with their truth, and a model card."""
