"""Finds a bundle by name: the built-in demo, a directory, or a repository on the hub."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from florence_onnx.bundles.bundle import (
    DEMO,
    DEMO_DIRECTORY,
    GRAPHS,
    JS_GRAPHS,
    JS_SUFFIXES,
    PREFERRED_PRECISIONS,
    VISION_ENCODER,
    WEIGHTS,
    Bundle,
    choose,
    read,
)
from florence_onnx.errors import BundleError, BundleNotFoundError

_log = logging.getLogger("florence_onnx")

_HUB_FILES = (
    "*.json",
    *(f"{graph}*" for graph in GRAPHS),
    f"{Path(VISION_ENCODER).stem}_*.onnx",
    WEIGHTS,
)


def resolve(
    name: str | os.PathLike[str],
    *,
    precision: str | None = None,
    preferred: Sequence[str] = PREFERRED_PRECISIONS,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Bundle:
    """Finds a bundle by name.

    Args:
        name: `"demo"` (always the built-in model, even if there is a directory of that name), a directory, or a hub
            repository (`owner/name`).
        precision: As for `bundle.read`.
        preferred: As for `bundle.read`.
        revision: Branch, tag or commit of a hub repository.
        cache_dir: Where downloads are kept, instead of the hub client's default.

    Raises:
        BundleNotFoundError: There is no such directory or repository, or the hub cannot be reached.
        BundleError: It exists and cannot be used; see `bundle.read`.
    """
    text = os.fspath(name)
    if text == DEMO:
        return read(DEMO_DIRECTORY, precision)
    path = Path(name)
    if text and path.is_dir():
        return read(path, precision, preferred=preferred)
    if path.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")) or not all(text.split("/")):
        raise BundleNotFoundError(
            f'{text!r} is not a directory; give a bundle directory, a hub repository "owner/name", or "demo"'
        )
    return _from_hub(text, precision, preferred, revision, cache_dir)


def default_cache() -> Path:
    """The folder in which the hub client keeps downloads unless `cache_dir` says otherwise."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _from_hub(
    repository: str,
    precision: str | None,
    preferred: Sequence[str],
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
) -> Bundle:
    """Reads a bundle from the hub client's cache; the hub is asked only for files that are not in it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    suffix = JS_SUFFIXES.get(precision or "fp32", "")
    patterns = [*_HUB_FILES, *(f"onnx/{graph}{suffix}.onnx*" for graph in JS_GRAPHS)]

    def fetch(**options: Any) -> Path:
        def take(allowed: list[str]) -> Path:
            folder = snapshot_download(
                repository,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=allowed,
                endpoint=os.environ.get("HF_ENDPOINT"),  # the client itself reads this only when it is imported
                **options,
            )
            return Path(folder)

        folder = take(patterns)
        # `*.json` matches in subdirectories too, so a repository of several bundles gave their descriptions only:
        # choose by these, and download the files of the chosen one
        chosen = choose(folder, precision, preferred)
        return folder if chosen is None else take([f"{chosen}/*"])

    # The cache first: a model that was downloaded once loads without a network, and without waiting for the hub. The
    # client does not know which files a bundle needs, so it is `read` that finds an incomplete one.
    try:
        return read(fetch(local_files_only=True), precision, preferred=preferred)
    except HFValidationError as error:
        raise BundleNotFoundError(f"{repository!r} is neither a directory nor a hub repository: {error}") from error
    except (LocalEntryNotFoundError, BundleError) as error:
        _log.info("%s is not complete in the local cache (%s); asking the hub", repository, error)
    path = _download(repository, revision, fetch)
    try:
        return read(path, precision, preferred=preferred)
    except BundleNotFoundError as error:
        raise BundleNotFoundError(
            f"the hub repository {repository!r} contains no ONNX model. If it is a PyTorch checkpoint, convert it "
            f"with: florence-onnx-export {repository} OUT"
        ) from error


def _download(repository: str, revision: str | None, fetch: Callable[[], Path]) -> Path:
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return fetch()
    except RevisionNotFoundError as error:
        raise BundleNotFoundError(f"the hub repository {repository!r} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise BundleNotFoundError(
            f"no hub repository {repository!r}; if it is private, log in with: hf auth login"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BundleNotFoundError(
            f"{repository!r} is not in the local cache and the hub could not be reached ({error}); "
            "download it on a machine with a network and pass its directory"
        ) from error
