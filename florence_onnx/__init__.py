"""Florence-2 on ONNX Runtime: all 15 tasks, the reference's exact answers, fal's result shapes, no PyTorch."""

from florence_onnx import tasks
from florence_onnx._version import __version__
from florence_onnx.errors import (
    BundleError,
    BundleFileMissingError,
    BundleFormatError,
    BundleNotFoundError,
    CheckpointError,
    CorruptGraphError,
    FlorenceError,
    ImageDecodeError,
    ImageDownloadError,
    ImageError,
    ImageNotFoundError,
    ImageTooLargeError,
    InputError,
    MissingExtraError,
    OptionsError,
    ProviderError,
    RegionError,
    TextInputError,
    UnknownTaskError,
    VerificationError,
)
from florence_onnx.locations import Region
from florence_onnx.model import Florence2
from florence_onnx.options import GenerationOptions
from florence_onnx.prediction import EncodedImage, Prediction
from florence_onnx.results import (
    BoundingBox,
    BoundingBoxes,
    Image,
    OCRBoundingBox,
    OCRBoundingBoxSingle,
    Point,
    Polygon,
    PolygonOutput,
)

__all__ = [
    "BoundingBox",
    "BoundingBoxes",
    "BundleError",
    "BundleFileMissingError",
    "BundleFormatError",
    "BundleNotFoundError",
    "CheckpointError",
    "CorruptGraphError",
    "EncodedImage",
    "Florence2",
    "FlorenceError",
    "GenerationOptions",
    "Image",
    "ImageDecodeError",
    "ImageDownloadError",
    "ImageError",
    "ImageNotFoundError",
    "ImageTooLargeError",
    "InputError",
    "MissingExtraError",
    "OCRBoundingBox",
    "OCRBoundingBoxSingle",
    "OptionsError",
    "Point",
    "Polygon",
    "PolygonOutput",
    "Prediction",
    "ProviderError",
    "Region",
    "RegionError",
    "TextInputError",
    "UnknownTaskError",
    "VerificationError",
    "__version__",
    "tasks",
]
