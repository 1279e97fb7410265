"""Static against dynamic int8 in the vision encoder: `python -m benchmarks.cpu.static_int8 FP32_BUNDLE IMAGE [IMAGE…]`.

Static quantization (ONNX Runtime's QDQ form) takes the ranges of the activations from a calibration on images. It need
not find them at run time, but a new image may exceed them. Both forms quantize the same `Gemm` nodes, with 7-bit
weights and a scale per channel. Printed are the time of each form, and the error of the features against fp32 on images
that were not used for the calibration.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from PIL import ImageOps

from export.precisions.quantization import to_dynamic_int8
from florence_onnx.bundles import bundle
from florence_onnx.images import decoding, preprocessing
from florence_onnx.runtime import cpu

Floats = npt.NDArray[np.float32]
FORMS = ("fp32", "dynamic", "static")


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is untyped
    def __init__(self, images: Sequence[Floats]) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, Floats] | None:
        image = next(self._images, None)
        return None if image is None else {"pixel_values": image}


def views(path: Path, size: tuple[int, int]) -> Iterator[Floats]:
    """Yields an image, its four quarters and its mirror image as `pixel_values` `(1, 3, H, W)`."""
    image = decoding.load(path)
    width, height = image.size
    boxes = [(0, 0, width, height)]
    boxes += [(x, y, x + width // 2, y + height // 2) for x in (0, width // 2) for y in (0, height // 2)]
    for box in boxes:
        yield preprocessing.preprocess(image.crop(box), size=size)
    yield preprocessing.preprocess(ImageOps.mirror(image), size=size)


def make_graphs(source: Path, calibration: Sequence[Floats], folder: Path) -> dict[str, Path]:
    """Writes the three forms of the graph, each in a folder of its own with a copy of the weights.

    Args:
        source: An fp32 bundle.
        calibration: Images to calibrate on, as `pixel_values`.
        folder: Folder to write to.

    Returns:
        The `.onnx` files by form.
    """
    paths = {form: folder / form / bundle.VISION_ENCODER for form in FORMS}
    for path in paths.values():
        path.parent.mkdir()
        for name in (bundle.VISION_ENCODER, bundle.WEIGHTS):
            shutil.copy2(source / name, path.parent / name)
    to_dynamic_int8(paths["dynamic"], kinds=("Gemm",))
    quantize_static(
        paths["fp32"],
        paths["static"],
        _Reader(calibration),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Gemm"],
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return paths


def measure(paths: dict[str, Path], images: Sequence[Floats], rounds: int, threads: int) -> dict[str, Any]:
    """Measures seconds and relative errors of each form."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    sessions = {
        form: onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for form, path in paths.items()
    }
    features = {form: [run(session, image) for image in images] for form, session in sessions.items()}
    seconds: dict[str, list[float]] = {form: [] for form in sessions}
    for _ in range(rounds):
        for form, session in sessions.items():
            start = time.perf_counter()
            run(session, images[0])
            seconds[form].append(time.perf_counter() - start)
    return {
        form: {
            "min_s": min(seconds[form]),
            "median_s": float(np.median(seconds[form])),
            "relative_error": float(
                np.mean([_distance(own, exact) for own, exact in zip(features[form], features["fp32"], strict=True)])
            ),
        }
        for form in sessions
    }


def run(session: onnxruntime.InferenceSession, image: Floats) -> Floats:
    """Returns the features of one image."""
    features: Floats = session.run(None, {"pixel_values": image})[0]
    return features


def _distance(own: Floats, exact: Floats) -> float:
    """Returns the norm of the difference relative to the norm of the exact features."""
    return float(np.linalg.norm(own - exact) / np.linalg.norm(exact))


def main() -> None:
    """Prints a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, help="an fp32 bundle")
    parser.add_argument(
        "images",
        type=Path,
        nargs="+",
        help="the last one is used for the errors and the timing, the others for the calibration",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cpu.num_cores())
    arguments = parser.parse_args()
    if len(arguments.images) < 2:
        parser.error("give at least two images: one to calibrate on, and one to measure on")
    size = bundle.read(arguments.bundle).sizes.image_size
    *seen, unseen = ([*views(path, size)] for path in arguments.images)
    with tempfile.TemporaryDirectory() as folder:
        paths = make_graphs(arguments.bundle, [view for each in seen for view in each], Path(folder))
        found = measure(paths, unseen, arguments.rounds, arguments.threads)
    print("| vision encoder | min s | median s | error of the features |\n|---|---|---|---|")
    for form, row in found.items():
        print(f"| {form} | {row['min_s']:.3f} | {row['median_s']:.3f} | {row['relative_error']:.4f} |")
    print(json.dumps({"onnxruntime": onnxruntime.__version__, "threads": arguments.threads, **found}))


if __name__ == "__main__":
    main()
