"""The folder of a checkpoint: a local one, or a snapshot downloaded from the hub."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from florence_onnx.bundles.hub import connection_errors
from florence_onnx.errors import CheckpointError

from .model_card import MODEL_CARD
from .weight_files import PICKLED, SAFETENSORS, has_weights

_TEXT_FILES = ("*.json", "*.txt", MODEL_CARD)
_INDEX = f"{SAFETENSORS}.index.json"
_SAFE_PATTERNS = (f"{Path(SAFETENSORS).stem}*.safetensors", "adapter_model.safetensors")
_PICKLED_PATTERNS = (f"{Path(PICKLED).stem}*.bin", "adapter_model.bin")


def find_folder(source: str | os.PathLike[str], revision: str | None, *, with_weights: bool = True) -> Path:
    """Returns the folder of a checkpoint; a hub id is downloaded first.

    Args:
        source: An existing folder, or a hub id such as `microsoft/Florence-2-base`.
        revision: Branch, tag or commit of a hub id.
        with_weights: Whether to download weights too, or only configs and the tokenizer.

    Raises:
        CheckpointError: `source` is neither a folder nor a hub id, or the download failed.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; give the folder of the checkpoint that holds its config.json")
    name = os.fspath(source)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointError(f"no folder {name}; give an existing folder, or a hub id like microsoft/Florence-2-base")
    return _download(name, revision, with_weights=with_weights)


def patterns(names: Collection[str]) -> tuple[str, ...]:
    """Patterns of the files that are downloaded of a repository with files of these names."""
    is_safe = any(name in names for name in (SAFETENSORS, _INDEX, "adapter_model.safetensors"))
    return (*_TEXT_FILES, *(_SAFE_PATTERNS if is_safe else _PICKLED_PATTERNS))


def _download(repo_id: str, revision: str | None, *, with_weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    def fetch(*patterns: str) -> Path:
        # Subfolders hold other formats, such as onnx/, which are not read here.
        chosen = [*_TEXT_FILES, *patterns]
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=chosen,
                ignore_patterns=["*/*"],
                # huggingface_hub reads the variable when it is imported, which may be before it is set.
                endpoint=os.environ.get("HF_ENDPOINT"),
            )
        )

    try:
        if not with_weights:
            return fetch()
        folder = fetch(*_SAFE_PATTERNS)
        if has_weights(folder, SAFETENSORS) or (folder / "adapter_model.safetensors").is_file():
            return folder
        return fetch(*_PICKLED_PATTERNS)
    except (HfHubHTTPError, *connection_errors(), ValueError) as error:
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
