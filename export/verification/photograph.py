"""The image to verify on if the user gives none."""

from pathlib import Path

PHOTOGRAPH = Path(__file__).parent / "photograph.jpg"
"""Chelsea the cat, by Stéfan van der Walt, CC0, from scikit-image; scaled down."""
