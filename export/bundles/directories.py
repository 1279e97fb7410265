"""Output directories that appear under their name only when their content is complete."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from florence_onnx.bundles import bundle as bundles
from florence_onnx.errors import CheckpointError

from ..precisions.recipes import PRECISIONS


@contextmanager
def new_directory(output: Path, *, force: bool = False) -> Iterator[Path]:
    """Creates a directory that appears as `output` only when the block has succeeded.

    Args:
        output: The final path.
        force: Whether to replace an existing export in `output`. It is replaced at the very end; a process that is
            killed between the last two renames leaves it beside `output`, as `.NAME.old-*`.

    Yields:
        A temporary directory beside `output`; it is removed if the block fails.

    Raises:
        CheckpointError: `output` exists and `force` is not set, or it is not an export.
    """
    output = output.resolve()
    if output.exists() and not force:
        raise CheckpointError(f"{output} exists; give another directory, or --force to replace it")
    if output.exists() and not _is_replaceable(output):
        raise CheckpointError(
            f"{output} is not an exported model, and --force replaces nothing else; remove it yourself"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.incomplete-"))
    try:
        yield staging
        staging.chmod(0o755)
        _replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_replaceable(path: Path) -> bool:
    """Whether a directory is empty, or an export and not a checkpoint. Nothing else is ever deleted."""
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir()}
    is_checkpoint = any(name.endswith((".safetensors", ".bin")) for name in names)
    is_single = bundles.DESCRIPTION in names or {"onnx", "config.json"} <= names
    is_several = names <= set(PRECISIONS) and all((path / name / bundles.DESCRIPTION).is_file() for name in names)
    is_export = is_single or is_several
    return not names or (is_export and not is_checkpoint)


def _replace(source: Path, target: Path) -> None:
    if not target.exists():
        source.rename(target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old-"))
    target.rename(old / target.name)
    try:
        source.rename(target)
    except OSError:
        (old / target.name).rename(target)
        old.rmdir()
        raise
    shutil.rmtree(old)
