"""The tensors of a checkpoint folder: safetensors or a pickled state dict, whole or sharded."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath

import torch
from safetensors import SafetensorError, safe_open

from florence_onnx.errors import CheckpointError

from .json_files import read_json, refuse_pointer

SAFETENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Reads all tensors, by stored name and in their stored dtype, from safetensors or else from a pickled state dict.

    Raises:
        CheckpointError: There are no weights, a shard is missing or lies in another folder, a file is damaged, or a
            pickle holds more than tensors.
    """
    for name in (SAFETENSORS, PICKLED):
        if not has_weights(folder, name):
            continue
        weights: dict[str, torch.Tensor] = {}
        for path in _shards(folder, name):
            weights.update(read_named_weights(path.parent, path.name))
        return weights
    if (folder / "onnx").is_dir():
        raise CheckpointError(
            f"{folder} holds no PyTorch weights but ONNX graphs, in the layout of transformers.js; nothing is to be "
            "exported: load them "
            "with Florence2.from_pretrained"
        )
    is_adapter = (folder / "adapter_config.json").is_file()
    hint = "; it has the config of a LoRA adapter, but no adapter_model.safetensors" if is_adapter else ""
    raise CheckpointError(f"{folder} has no weights ({SAFETENSORS} or {PICKLED}, whole or sharded){hint}")


def read_named_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Reads all tensors of one file, by stored name and in their stored dtype.

    Raises:
        CheckpointError: It is damaged, or a pickle that holds more than tensors.
    """
    path = folder / name
    refuse_pointer(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)


def has_weights(folder: Path, name: str) -> bool:
    """Whether a folder has weights under a name (`SAFETENSORS` or `PICKLED`), whole or as the index of shards."""
    return (folder / name).is_file() or (folder / f"{name}.index.json").is_file()


def _shards(folder: Path, name: str) -> Iterator[Path]:
    index = None if (folder / name).is_file() else read_json(folder, f"{name}.index.json")
    if index is None:
        yield folder / name
        return
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{folder / name}.index.json has no weight_map")
    _check_names(shards.values(), folder / f"{name}.index.json")
    for shard in sorted(set(shards.values())):
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder} lacks {shard}, which {name}.index.json names; download it again")
        yield folder / shard


def _check_names(shards: Iterable[object], index: Path) -> None:
    """Raises CheckpointError for a shard that would be read from another folder than that of its index."""
    for shard in shards:
        # of a Windows path, which takes "/" and a drive as well
        if not isinstance(shard, str) or shard in ("", "..") or PureWindowsPath(shard).name != shard:
            raise CheckpointError(
                f"{index} names the shard {shard!r}; a shard is a file in the same folder, such as "
                "model-00001-of-00002.safetensors: other files are not read. Download the index again"
            )


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); download it again") from error


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged, or holds more than tensors, which is not loaded: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{path} does not hold a state dict of tensors")
    return content
