"""Finds a bundle by name: the built-in demo, a directory, or a repository on the hub."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from florence_onnx.bundles import precisions
from florence_onnx.bundles.bundle import (
    DEMO,
    DEMO_DIRECTORY,
    DESCRIPTION,
    GRAPHS,
    PREFERRED_PRECISIONS,
    VISION_ENCODER,
    WEIGHTS,
    Bundle,
    choose,
    read,
)
from florence_onnx.bundles.precisions import Precision
from florence_onnx.errors import (
    BundleError,
    BundleFileMissingError,
    BundleFormatError,
    BundleNotFoundError,
    HubAccessError,
    InputError,
)

T = TypeVar("T")
_log = logging.getLogger("florence_onnx")

BUNDLE_FILES = (
    "*.json",
    *(f"{graph}*" for graph in GRAPHS),
    f"{Path(VISION_ENCODER).stem}_*.onnx",
    WEIGHTS,
)
"""Patterns of the files of one bundle at the top of a repository."""


def resolve(
    name: str | os.PathLike[str],
    *,
    precision: Precision | None = None,
    preferred: Sequence[str] = PREFERRED_PRECISIONS,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_only: bool = False,
) -> Bundle:
    """Finds a bundle by name.

    Args:
        name: `"demo"` (always the built-in model, even if there is a directory of that name), a directory, or a hub
            repository (`owner/name`).
        precision: As for `bundle.read`.
        preferred: As for `bundle.read`.
        revision: Branch, tag or commit of a hub repository.
        cache_dir: Where downloads are kept, instead of the hub client's default.
        local_only: Whether to download nothing.

    Raises:
        BundleNotFoundError: There is no such directory or repository, or the hub cannot be reached or must not be asked.
        BundleError: It exists and cannot be used; see `bundle.read`. Of a hub repository that lacks files of this precision
            nothing more than its JSON files is downloaded.
        InputError: `precision` is malformed.
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
    return _from_hub(text, precision, preferred, revision, cache_dir, local_only)


def check_repository(name: str) -> None:
    """Raises InputError where a name cannot be that of a hub repository."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII):
        raise InputError(f"{name!r} is no hub repository; give one as owner/name")


def default_cache() -> Path:
    """The folder in which the hub client keeps downloads unless `cache_dir` says otherwise."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _from_hub(
    repository: str,
    precision: Precision | None,
    preferred: Sequence[str],
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_only: bool,
) -> Bundle:
    """Reads a bundle from the hub client's cache; the hub is asked only for files that are not in it."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    patterns = [*BUNDLE_FILES, *(f"{file}*" for file in js_files(precision))]

    def fetch(**options: Any) -> Path:
        def take(allowed: list[str]) -> Path:
            return snapshot(repository, allowed, revision, cache_dir=cache_dir, **options)

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
        if local_only:
            raise BundleNotFoundError(f"{repository!r} is not in the local cache: {error}") from error
        _log.info("%s is not complete in the local cache (%s); asking the hub", repository, error)
        lacks = str(error) if isinstance(error, BundleFileMissingError) else ""
    # before gigabytes of the other modules are downloaded
    names = download(repository, revision, lambda: _published(repository, revision), lacks)
    _check_published(repository, precision, names)
    path = download(repository, revision, fetch, lacks)
    try:
        return read(path, precision, preferred=preferred)
    except BundleNotFoundError as error:
        raise no_model(repository) from error


def js_files(precision: Precision | None) -> list[str]:
    """The graphs of a precision in the layout of transformers.js; none where that layout has no such precision."""
    try:
        return [precisions.js_file(*module) for module in precisions.js_modules(precision).items()]
    except BundleFormatError:
        return []


def _published(repository: str, revision: str | None) -> set[str]:
    """The paths of all files of a repository."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import DEFAULT_REVISION

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    siblings = api.model_info(repository, revision=revision or DEFAULT_REVISION).siblings
    return {file.rfilename for file in siblings or ()}


def _check_published(repository: str, precision: Precision | None, names: Collection[str]) -> None:
    """Raises BundleFileMissingError where a repository in the layout of transformers.js lacks a graph of this precision."""
    is_own = any(PurePosixPath(name).name == DESCRIPTION for name in names)
    if not is_own and any(name.startswith("onnx/") for name in names):
        precisions.check_present(precisions.js_modules(precision), names, f"the hub repository {repository!r}")


def snapshot(repository: str, patterns: list[str], revision: str | None, **options: Any) -> Path:
    """The folder of the files of a repository that match one of the patterns; the client's own errors are raised."""
    from huggingface_hub import snapshot_download

    # the client itself reads the variable only when it is imported
    endpoint = os.environ.get("HF_ENDPOINT")
    return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, endpoint=endpoint, **options))


def no_model(repository: str) -> BundleNotFoundError:
    """The error for a repository without a bundle."""
    return BundleNotFoundError(
        f"the hub repository {repository!r} contains no ONNX model. If it is a PyTorch checkpoint, convert it "
        f"with: florence-onnx-export {repository} OUT"
    )


def download(repository: str, revision: str | None, fetch: Callable[[], T], lacks: str = "") -> T:
    """Calls `fetch`, and turns the errors of the hub's client into those of this package.

    Args:
        repository: Hub repository.
        revision: Branch, tag or commit; for the errors.
        fetch: Asks the hub.
        lacks: What the local cache lacks, if it has a part of the repository.

    Raises:
        BundleNotFoundError: There is no such repository or revision, or the hub cannot be reached.
        HubAccessError: The hub refuses the token, or the licence has not been accepted.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return fetch()
    except RevisionNotFoundError as error:
        raise BundleNotFoundError(f"the hub repository {repository!r} has no revision {revision!r}") from error
    except GatedRepoError as error:
        raise HubAccessError(
            f"the licence of {repository} must be accepted on its page, then log in with: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise BundleNotFoundError(
            f"no hub repository {repository!r}; if it is private, log in with: hf auth login"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, *connection_errors()) as error:
        if status_of(error) in REFUSALS:
            raise HubAccessError(
                f"the hub refuses the token for {repository}: log in with hf auth login, or set HF_TOKEN ({error})"
            ) from error
        found = f"is not complete in the local cache ({lacks})" if lacks else "is not in the local cache"
        raise BundleNotFoundError(
            f"{repository!r} {found} and the hub could not be reached ({error}); "
            "download it on a machine with a network and pass its directory"
        ) from error


def connection_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises where it reaches no hub: an OSError, since version 1 one of its HTTP library.

    That library is httpx, under one of two names; whichever the client uses is imported by then.
    """
    libraries = (sys.modules.get(name) for name in ("httpx", "httpx2"))
    return (OSError, *(library.HTTPError for library in libraries if library is not None))


REFUSALS = (401, 403)
"""HTTP statuses of a token that is missing, wrong, or has no right to what was asked."""


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status that an error of the hub's client, or what caused it, came with; None if the hub did not answer."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None
