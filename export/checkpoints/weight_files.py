"""The files of a checkpoint: where they are, and the tensors in them."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from florence_onnx.errors import CheckpointError

_SAFETENSORS = "model.safetensors"
_PICKLED = "pytorch_model.bin"
_TEXT_FILES = ("*.json", "*.txt")


def find_folder(source: str | os.PathLike[str], revision: str | None) -> Path:
    """The folder of a checkpoint, downloaded when `source` is a hub id.

    Args:
        source: An existing folder, or a hub id such as `microsoft/Florence-2-base`.
        revision: Branch, tag or commit of a hub id.

    Raises:
        CheckpointError: Neither; or the hub cannot give it.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; give the folder of the checkpoint that holds its config.json")
    name = os.fspath(source)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointError(f"no folder {name}; give an existing folder, or a hub id like microsoft/Florence-2-base")
    return _download(name, revision)


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    def fetch(*patterns: str) -> Path:
        # Sub-folders hold other formats (onnx/), never what is read here.
        chosen = [*_TEXT_FILES, *patterns]
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=chosen,
                ignore_patterns=["*/*"],
                # huggingface_hub reads the variable once, when it is imported, which may be before it is set.
                endpoint=os.environ.get("HF_ENDPOINT"),
            )
        )

    try:
        folder = fetch(f"{Path(_SAFETENSORS).stem}*.safetensors")
        return folder if _has_weights(folder, _SAFETENSORS) else fetch(f"{Path(_PICKLED).stem}*.bin")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(_download_advice(repo_id, revision, error)) from error


def _download_advice(repo_id: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = repo_id + (f" at revision {revision}" if revision else "")
    if isinstance(error, GatedRepoError):
        advice = "its licence must be accepted on its page, then log in with: hf auth login"
    elif isinstance(error, RepositoryNotFoundError):
        advice = "no such folder, and no such repository on the hub; a private one needs: hf auth login"
    elif isinstance(error, RevisionNotFoundError):
        advice = "the repository has no such revision"
    elif isinstance(error, LocalEntryNotFoundError):
        advice = "the hub cannot be reached and nothing is cached; connect, or give a local folder"
    else:
        advice = f"the download failed: {type(error).__name__}: {error}"
    return f"cannot get the checkpoint {name}: {advice}"


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file.

    Raises:
        CheckpointError: Not JSON, or not an object.
    """
    path = folder / name
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def write_json(path: Path, value: object) -> None:
    """Write JSON for people and machines."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors by stored name, in their stored dtype: safetensors where there are any, else a pickled state dict.

    Raises:
        CheckpointError: No weights, a missing shard, a damaged file, a pickle that holds more than tensors.
    """
    for name in (_SAFETENSORS, _PICKLED):
        if not _has_weights(folder, name):
            continue
        weights: dict[str, torch.Tensor] = {}
        for path in _shards(folder, name):
            weights.update(_read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path))
        return weights
    hint = "; it is a LoRA adapter: merge it into its base model first" if _is_adapter(folder) else ""
    raise CheckpointError(f"{folder} has no weights ({_SAFETENSORS} or {_PICKLED}, whole or sharded){hint}")


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _has_weights(folder: Path, name: str) -> bool:
    return (folder / name).is_file() or (folder / f"{name}.index.json").is_file()


def _shards(folder: Path, name: str) -> Iterator[Path]:
    index = None if (folder / name).is_file() else read_json(folder, f"{name}.index.json")
    if index is None:
        yield folder / name
        return
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{folder / name}.index.json has no weight_map")
    for shard in sorted(set(shards.values())):
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder} lacks {shard}, which {name}.index.json names; download it again")
        yield folder / shard


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
