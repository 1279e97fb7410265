"""Florence-2 on ONNX Runtime: all 15 tasks, the tokens of transformers, fal's result shapes, no PyTorch."""

from florence_onnx import tasks
from florence_onnx._version import __version__
from florence_onnx.answers.locations import Region
from florence_onnx.answers.results import (
    BoundingBox,
    BoundingBoxes,
    Image,
    OCRBoundingBox,
    OCRBoundingBoxSingle,
    Point,
    Polygon,
    PolygonOutput,
)
from florence_onnx.detecting.detections import Detections
from florence_onnx.errors import (
    BundleError,
    BundleFileMissingError,
    BundleFormatError,
    BundleNotFoundError,
    CancelledError,
    CheckpointError,
    CorruptGraphError,
    DeadlineError,
    DeviceMemoryError,
    FlorenceError,
    HubAccessError,
    HubError,
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
from florence_onnx.generation.options import GenerationOptions
from florence_onnx.generation.progress import Cancel, Deadline
from florence_onnx.grammar import Choice, Grammar
from florence_onnx.model import Florence2
from florence_onnx.prediction import EncodedImage, Prediction
from florence_onnx.tiling.tiles import Tiles

__all__ = [
    "BoundingBox",
    "BoundingBoxes",
    "BundleError",
    "BundleFileMissingError",
    "BundleFormatError",
    "BundleNotFoundError",
    "Cancel",
    "CancelledError",
    "CheckpointError",
    "Choice",
    "CorruptGraphError",
    "Deadline",
    "DeadlineError",
    "Detections",
    "DeviceMemoryError",
    "EncodedImage",
    "Florence2",
    "FlorenceError",
    "GenerationOptions",
    "Grammar",
    "HubAccessError",
    "HubError",
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
    "Tiles",
    "UnknownTaskError",
    "VerificationError",
    "__version__",
    "tasks",
]
