"""Changing a bundle's generation defaults in place."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from florence_onnx.bundles import bundle as bundles
from florence_onnx.bundles.bundle import CONFIGURED, DEMO, DEMO_DIRECTORY, Bundle
from florence_onnx.bundles.json_files import read_json
from florence_onnx.errors import BundleNotFoundError, InputError


def configure(path: Path | str, changes: Mapping[str, Any], precision: str | None = None) -> dict[str, Any]:
    """Changes the generation options that a bundle has by default, in the file `generation_options.json`.

    The checkpoint's own generation_config.json stays as it is. Everything is checked before anything is written, and the file
    is replaced in one step, so that a model that loads meanwhile reads the old options or the new ones.

    Args:
        path: The bundle's directory.
        changes: Options by name, as `GenerationOptions` has them; None goes back to the checkpoint's.
        precision: Which bundle, where several lie in `path`; None changes all of them.

    Returns:
        All options that are configured now, by name; of the first bundle where there are several.

    Raises:
        BundleNotFoundError: There is no such directory.
        BundleFormatError: An option is unknown or not possible with this model.
        InputError: It is the built-in demo, or cannot be written to.
    """
    if str(path) == DEMO or Path(path).resolve() == DEMO_DIRECTORY.resolve():
        raise InputError("the built-in demo cannot be configured: copy its directory, or pass options to each call")
    if not Path(path).is_dir():
        raise BundleNotFoundError(f"{path} is not a directory: only a bundle on this machine can be configured")
    planned = [_plan(found, changes) for found in _bundles(Path(path), precision)]
    for folder, options in planned:
        _write(folder / CONFIGURED, options)
    return planned[0][1]


def _bundles(path: Path, precision: str | None) -> Iterator[Bundle]:
    names = [entry.parent.name for entry in sorted(path.glob(f"*/{bundles.DESCRIPTION}"))]
    if names and precision is None and not (path / bundles.DESCRIPTION).is_file():
        yield from (bundles.read(path / name) for name in names)
    else:
        yield bundles.read(path, precision)


def _plan(bundle: Bundle, changes: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The options that a bundle will have, checked."""
    file = bundle.path / CONFIGURED
    options = {**(read_json(file) if file.is_file() else {}), **changes}
    # unknown names are refused even where their value is None
    bundles.configured_with(bundle.checkpoint_generation or bundle.generation, options, bundle.path)
    return bundle.path, {name: value for name, value in options.items() if value is not None}


def _write(file: Path, options: Mapping[str, Any]) -> None:
    try:
        if not options:
            file.unlink(missing_ok=True)
            return
        handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        made = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as temporary:
                temporary.write(json.dumps(options, indent=2) + "\n")
            made.chmod(0o644)  # mkstemp's own mode would shut out servers that run as another user
            made.replace(file)
        except BaseException:
            with contextlib.suppress(OSError):
                made.unlink()
            raise
    except OSError as error:
        raise InputError(f"cannot write {file}: {error}") from error
