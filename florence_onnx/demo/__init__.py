"""The built-in demo model: a bundle, sample images with their ground truth, and a model card."""
