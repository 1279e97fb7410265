"""Downloading whole bundles from the hub, with every hash checked. Loading a model needs less: see `hub.resolve`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florence_onnx.bundles import bundle as bundles
from florence_onnx.bundles import hub
from florence_onnx.bundles.bundle import DESCRIPTION, PREFERRED_PRECISIONS, Bundle
from florence_onnx.bundles.json_files import read_json
from florence_onnx.errors import BundleNotFoundError, CorruptGraphError, InputError

CARD = "README.md"
_MARK = Path(".cache") / "huggingface"
"""What the hub client leaves in a folder that it has downloaded to."""


@dataclass(frozen=True)
class Pulled:
    """What a pull has left on this machine."""

    folder: Path
    """The folder to load from."""
    bundles: tuple[Bundle, ...]
    """One, or several in subfolders named after their precision."""
    num_hashed: int
    """Files whose hash was compared with the recorded one; 0 in the layout of transformers.js, which records none."""
    num_bytes: int
    """Size of all files of the bundles."""


def pull(
    repository: str,
    folder: Path | None = None,
    *,
    precision: str | None = None,
    revision: str | None = None,
    force: bool = False,
) -> Pulled:
    """Downloads all bundles of a hub repository and compares every file with its recorded hash.

    A pull that was interrupted goes on where it stopped.

    Args:
        repository: `owner/name`.
        folder: Where to put them; None keeps them in the hub client's cache, where `from_pretrained("owner/name")`
            finds them.
        precision: Which of several bundles; None is all of them. In the layout of transformers.js None means fp32.
        revision: Branch, tag or commit.
        force: Whether to download again what is there already.

    Raises:
        InputError: `repository` is no name of one, or `folder` holds something else.
        BundleNotFoundError: There is no such repository or revision, it holds no bundle, or the hub is out of reach.
        HubAccessError: The hub refuses the token.
        CorruptGraphError: A file is not what the bundle's description says.
    """
    _check_arguments(repository, folder)
    precisions = (precision,) if precision else PREFERRED_PRECISIONS
    wanted = [
        *(*hub.BUNDLE_FILES, CARD),
        *(f"{name}/*" for name in precisions),
        *(f"{file}*" for file in hub.js_files(precision)),
    ]
    options: dict[str, Any] = {"local_dir": folder, "force_download": force}
    path = hub.download(repository, revision, lambda: hub.snapshot(repository, wanted, revision, **options))
    try:
        found = tuple(_read(path, precision))
        num_hashed = sum(_check(each) for each in found)
    except BundleNotFoundError as error:
        raise hub.no_model(repository) from error
    except CorruptGraphError as error:
        raise CorruptGraphError(f"{error}: florence-onnx pull {repository} --force downloads it again") from error
    return Pulled(path, found, num_hashed, sum(_size(each) for each in found))


def _check_arguments(repository: str, folder: Path | None) -> None:
    hub.check_repository(repository)
    if folder is None or not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give another folder")
    if any(folder.iterdir()) and not (folder / _MARK).is_dir():
        raise InputError(f"{folder} is not empty and no pull made it; give another folder")


def _read(path: Path, precision: str | None) -> Iterator[Bundle]:
    """All bundles in a folder, or the one of the asked precision."""
    several = sorted(entry.parent.name for entry in path.glob(f"*/{DESCRIPTION}"))
    if (path / DESCRIPTION).is_file() or precision is not None or not several:
        yield bundles.read(path, precision)
    else:
        yield from (bundles.read(path, name) for name in several)


def _check(bundle: Bundle) -> int:
    """Compares all hashes; returns how many there are."""
    if bundle.layout != "florence_onnx":
        return 0
    files = read_json(bundle.path / DESCRIPTION)["files"]
    bundles.check_files(bundle.path, files, max_hashed_bytes=None)
    return len(files)


def _size(bundle: Bundle) -> int:
    paths = [path for path in bundle.path.rglob("*") if not path.is_relative_to(bundle.path / ".cache")]
    return sum(path.stat().st_size for path in paths if path.is_file())
