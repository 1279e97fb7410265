"""What a check downloads: its size beforehand, and its removal afterwards."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from florence_onnx.bundles.hub import connection_errors, default_cache

from ..checkpoints.folder import patterns

EXPORT_FACTOR = 5
"""Disk space for an export in multiples of a checkpoint in fp16, from which fp32 graphs are written twice for a while."""
_TIMEOUT = 30.0


@dataclass(frozen=True)
class Plan:
    """What will be downloaded for one checkpoint."""

    checkpoint: str
    num_files: int = 0
    num_bytes: int = 0
    """Of the files, whether or not they are in the cache already."""
    is_cached: bool = False
    """Whether the checkpoint was in the hub client's cache before; it is then not removed."""
    problem: str | None = None
    """Why the hub did not say; None if it did."""

    @property
    def num_bytes_needed(self) -> int:
        """Disk space for the download and the export."""
        return self.num_bytes * (EXPORT_FACTOR + (0 if self.is_cached else 1))

    def __str__(self) -> str:
        if self.problem is not None:
            return f"{self.checkpoint}: size unknown ({self.problem})"
        cached = ", in the cache already" if self.is_cached else ""
        return f"{self.checkpoint}: {self.num_bytes / 1e6:,.0f} MB in {self.num_files} files{cached}"


def make_plan(checkpoint: str, revision: str | None) -> Plan:
    """Asks the hub what a download of a checkpoint will take."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    is_cached = cache_folder(checkpoint).is_dir()
    try:
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        info = api.model_info(checkpoint, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    except (HfHubHTTPError, *connection_errors(), ValueError) as error:
        return Plan(checkpoint, is_cached=is_cached, problem=" ".join(str(error).split())[:120])
    sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
    wanted = patterns(sizes)
    taken = [size for name, size in sizes.items() if "/" not in name and any(fnmatch(name, each) for each in wanted)]
    return Plan(checkpoint, len(taken), sum(taken), is_cached)


def find_shortage(plan: Plan, folder: Path) -> str | None:
    """What disk space is missing in the cache and in `folder`, as a sentence; None if it suffices."""
    for place in {_existing(default_cache()), _existing(folder)}:
        free = shutil.disk_usage(place).free
        if free < plan.num_bytes_needed:
            return (
                f"{plan.num_bytes_needed / 1e9:.1f} GB of disk space are needed and {free / 1e9:.1f} GB are free in {place}: "
                "make room, or set HF_HOME and --work to another disk"
            )
    return None


def _existing(path: Path) -> Path:
    return next(each for each in (path.resolve(), *path.resolve().parents) if each.exists())


def cache_folder(checkpoint: str) -> Path:
    """Where the hub client keeps a checkpoint."""
    from huggingface_hub.file_download import repo_folder_name

    return default_cache() / str(repo_folder_name(repo_id=checkpoint, repo_type="model"))


def remove_download(checkpoint: str) -> None:
    """Removes a checkpoint from the hub client's cache."""
    shutil.rmtree(cache_folder(checkpoint), ignore_errors=True)
