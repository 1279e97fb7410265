"""The built-in demo model: a bundle, sample images with their truth, and a model card."""
