"""Skeletons: bundles with statistics instead of weights, small enough to copy, and filled again with random weights.

`python -m benchmarks.gpu.skeleton pack BUNDLE OUT.tar.xz --checkpoint DIR` keeps the graphs, everything small, and for
each large tensor its offset, shape, mean and standard deviation. `fill SKELETON.tar.xz OUT` fills the tensors with
normal random numbers of that mean and deviation. Times do not depend on weights; and weights that were random before
(`benchmarks.checkpoints`) keep their distribution, so activations stay finite. The same skeleton gives the same bytes
on every machine.

With `--exact` the weights are taken from the checkpoint, which must be available when the skeleton is filled. Tensors
that equal one of the checkpoint's tensors or its transpose are stored by name; the others (folded or concatenated) are
kept. The bundle is restored byte by byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto
from onnx.external_data_helper import ExternalDataInfo

from florence_onnx.bundles import bundle as bundles
from florence_onnx.bundles.description import sealed
from florence_onnx.runtime import cpu

LIST = "skeleton.json"
CONSTANTS = "constants.bin"
CHECKPOINT = "checkpoint"
"""Subfolder for the configs of the checkpoint, from which other runtimes build the same model."""
CONFIGS = ("config.json", "preprocessor_config.json", "generation_config.json")
_DTYPES = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}
WEIGHTS_FILE = "model.safetensors"
MAX_CONSTANT_BYTES = 16 * 2**20
"""Most bytes of kept tensors: indices, masks, tables. If there are more, the weights are not floats."""
MIN_DISTINCT = 64
"""A tensor with fewer distinct values is a table and not a weight."""
MAX_POSITIONS = 64
"""Largest kernel whose statistics are kept for each position."""
MAX_SIGMA = 4.0
"""Standard deviations at which random numbers are clipped, so that rare large ones do not overflow fp16."""


def pack(bundle: Path, output: Path, checkpoint: Path, *, exact: bool = False) -> Path:
    """Writes the skeleton of a bundle.

    Args:
        bundle: A bundle in either layout, in fp32 or fp16.
        output: The `.tar.xz` to write, or `.tar` if several are to be compressed together.
        checkpoint: The checkpoint that it was exported from.
        exact: Whether the weights are to be restored from the checkpoint.

    Returns:
        `output`.

    Raises:
        ValueError: More than `MAX_CONSTANT_BYTES` would have to be kept, as with integer weights.
    """
    with tempfile.TemporaryDirectory(dir=output.parent) as staging:
        folder = Path(staging) / "bundle"
        shutil.copytree(bundle, folder)
        graphs = sorted(folder.rglob("*.onnx"))
        weights = graphs[0].parent / bundles.WEIGHTS
        if not weights.is_file():  # the layout of transformers.js has them inside the graphs
            from export.bundles.weights import gather_weights

            gather_weights(graphs, weights)
        content, constants = _describe(graphs, weights, _Donor(checkpoint) if exact else None)
        (folder / LIST).write_text(json.dumps({"weights": str(weights.relative_to(folder)), **content}))
        (folder / CONSTANTS).write_bytes(constants)
        weights.unlink()
        (folder / CHECKPOINT).mkdir()
        for name in CONFIGS:
            shutil.copy(checkpoint / name, folder / CHECKPOINT / name)
        with tarfile.open(output, "w:xz" if output.suffix == ".xz" else "w") as archive:
            archive.add(folder, arcname=".")
    return output


class _Donor:
    """The tensors of a checkpoint, found by their content."""

    def __init__(self, checkpoint: Path) -> None:
        from safetensors.numpy import load_file

        self._tensors: dict[str, npt.NDArray[Any]] = load_file(checkpoint / WEIGHTS_FILE)
        self._names: dict[str, dict[bytes, tuple[str, bool]]] = {}

    def find(self, raw: bytes, dtype: str) -> tuple[str, bool] | None:
        """Returns the name of the tensor with this content, and whether it must be transposed, or None."""
        if dtype not in self._names:
            self._names[dtype] = {
                hashlib.sha256(self.take(name, is_transposed, dtype)).digest(): (name, is_transposed)
                for name, tensor in self._tensors.items()
                for is_transposed in ((False, True) if tensor.ndim == 2 else (False,))
            }
        return self._names[dtype].get(hashlib.sha256(raw).digest())

    def take(self, name: str, is_transposed: bool, dtype: str) -> bytes:
        """Returns the bytes of a tensor."""
        tensor = self._tensors[name].astype(dtype)
        return (tensor.T if is_transposed else tensor).tobytes()


def _describe(graphs: Sequence[Path], weights: Path, donor: _Donor | None) -> tuple[dict[str, Any], bytes]:
    """Returns the list of tensors, and the bytes of those that are kept."""
    data = np.memmap(weights, dtype=np.uint8, mode="r")
    tensors: dict[int, dict[str, Any]] = {}
    constants = bytearray()
    for path in graphs:
        for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
            if tensor.data_location != TensorProto.EXTERNAL:
                continue
            place = ExternalDataInfo(tensor)
            if place.offset not in tensors:
                tensors[place.offset] = _entry(tensor, place, data, constants, donor)
    if len(constants) > MAX_CONSTANT_BYTES:
        raise ValueError(f"{weights}: {len(constants)} bytes would have to be kept; pack a bundle in fp32 or fp16")
    return {"size": len(data), "tensors": [tensors[offset] for offset in sorted(tensors)]}, bytes(constants)


def _entry(
    tensor: TensorProto,
    place: ExternalDataInfo,
    data: npt.NDArray[np.uint8],
    constants: bytearray,
    donor: _Donor | None,
) -> dict[str, Any]:
    raw = data[place.offset : place.offset + place.length]
    entry = {"name": tensor.name, "offset": place.offset, "length": place.length}
    dtype = _DTYPES.get(tensor.data_type)
    source = donor.find(raw.tobytes(), dtype) if donor is not None and dtype is not None else None
    if source is not None:
        return entry | {"dtype": dtype, "source": source}
    if donor is not None or dtype is None or _is_table(raw.view(dtype)):
        entry["kept_at"] = len(constants)
        constants.extend(raw.tobytes())
        return entry
    values = raw.view(dtype).astype(np.float64).reshape(-1, _period(tensor.dims))
    moments = {"mean": values.mean(axis=0).tolist(), "std": values.std(axis=0).tolist()}
    return entry | {"dtype": dtype, "shape": list(tensor.dims)} | moments


def _period(shape: Sequence[int]) -> int:
    """Returns the number of values after which a tensor's statistics repeat; small kernels have them by position.

    The depthwise convolutions have a 1 added at the centre, which is their residual connection. With one mean for all
    nine positions, 48 of them in sequence overflow fp16.
    """
    inner = math.prod(shape[1:])
    return inner if inner <= MAX_POSITIONS else 1


def _is_table(values: npt.NDArray[Any]) -> bool:
    return len(np.unique(values[:4096])) < min(MIN_DISTINCT, len(values) // 4)


def fill(skeleton: Path, output: Path, seed: int = 0, *, checkpoint: Path | None = None) -> Path:
    """Makes a bundle from a skeleton; the folder appears only when it is complete.

    Args:
        skeleton: The file that `pack` wrote.
        output: Folder to create.
        seed: Seed of the random numbers.
        checkpoint: The checkpoint with the weights, for an exact skeleton.

    Returns:
        `output`.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as staging:
        folder = Path(staging) / "bundle"
        with tarfile.open(skeleton, "r:*") as archive:
            archive.extractall(folder, filter="data")
        content = json.loads((folder / LIST).read_text())
        weights = folder / content["weights"]
        donor = None if checkpoint is None else _Donor(checkpoint)
        _write_weights(weights, content, (folder / CONSTANTS).read_bytes(), seed, donor)
        _describe_again(folder, weights)
        shutil.move(folder, output)
    return output


def _write_weights(path: Path, content: dict[str, Any], constants: bytes, seed: int, donor: _Donor | None) -> None:
    data = np.memmap(path, dtype=np.uint8, mode="w+", shape=(content["size"],))

    def write(entry: dict[str, Any]) -> None:
        target = data[entry["offset"] : entry["offset"] + entry["length"]]
        if "kept_at" in entry:
            start = entry["kept_at"]
            target[:] = np.frombuffer(constants[start : start + entry["length"]], dtype=np.uint8)
        elif "source" in entry:
            assert donor is not None, f"{entry['name']} is in a checkpoint, and none was given"
            name, is_transposed = entry["source"]
            target[:] = np.frombuffer(donor.take(name, is_transposed, entry["dtype"]), dtype=np.uint8)
        else:
            target.view(entry["dtype"])[:] = _draw(entry, seed)

    with ThreadPoolExecutor(cpu.num_cores()) as pool:  # numpy's generators release the GIL
        list(pool.map(write, content["tensors"]))
    data.flush()


def _draw(entry: dict[str, Any], seed: int) -> npt.NDArray[np.float32]:
    """Returns normal random numbers with a tensor's mean and deviation; they depend on seed and offset only."""
    size = entry["length"] // np.dtype(entry["dtype"]).itemsize
    mean, std = (np.array(entry[name], dtype=np.float32) for name in ("mean", "std"))
    noise: npt.NDArray[np.float32] = np.random.default_rng([seed, entry["offset"]]).standard_normal(
        size, dtype=np.float32
    )
    np.clip(noise, -MAX_SIGMA, MAX_SIGMA, out=noise)
    rows = noise.reshape(-1, len(mean))
    rows *= std
    rows += mean
    return noise


def _describe_again(folder: Path, weights: Path) -> None:
    """Updates the bundle's description for the new weights; the layout of transformers.js has no description."""
    path = folder / bundles.DESCRIPTION
    if not path.is_file():
        return
    description = json.loads(path.read_text())
    size = weights.stat().st_size
    is_hashed = size <= bundles.MAX_HASHED_BYTES
    digest = bundles.sha256(weights) if is_hashed else "made by benchmarks.gpu.skeleton"
    if description["files"][weights.name] != {"size": size, "sha256": digest}:
        description["files"][weights.name] = {"size": size, "sha256": digest}
        description |= {"source": {"name": "random numbers, benchmarks.gpu.skeleton"}, "verification": {}}
    path.write_text(json.dumps(sealed(description)))


def main() -> None:
    """Command line: packs or fills a skeleton."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("pack", "fill"))
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="for pack; for fill of an exact skeleton")
    parser.add_argument("--exact", action="store_true", help="for pack: the weights are the checkpoint's")
    arguments = parser.parse_args()
    if arguments.action == "fill":
        fill(arguments.source, arguments.output, checkpoint=arguments.checkpoint)
    elif arguments.checkpoint is None:
        parser.error("pack needs --checkpoint")
    else:
        pack(arguments.source, arguments.output, arguments.checkpoint, exact=arguments.exact)


if __name__ == "__main__":
    main()
