"""Pushing bundles to the hub in one commit: all of it, or nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from florence_onnx.bundles import bundle as bundles
from florence_onnx.bundles import hub, own_tasks, precisions
from florence_onnx.bundles.bundle import Bundle
from florence_onnx.bundles.json_files import read_json
from florence_onnx.bundles.pulling import CARD
from florence_onnx.errors import (
    BundleFormatError,
    FlorenceError,
    HubAccessError,
    HubError,
    InputError,
    VerificationError,
)

from .card import Published, make_card

if TYPE_CHECKING:
    from huggingface_hub import HfApi

DEFAULT_BRANCH = "main"
AGAIN = (
    "nothing of it is published, and the repository is as it was. Run the same command again: files that arrived "
    "completely are not sent twice"
)
"""What an interrupted push means, and what to do."""

_BUNDLE_NAMES = {
    *(*bundles.GRAPHS, bundles.WEIGHTS, bundles.DESCRIPTION, bundles.TOKENIZER),
    *(bundles.GENERATION_CONFIG, bundles.CONFIGURED, bundles.JS_VERIFICATION),
}


@dataclass(frozen=True)
class Pushed:
    """What a push has published."""

    repository: str
    commit: str
    """The commit on the hub."""
    files: tuple[str, ...]
    """Names in the repository, the model card included."""
    num_bytes: int
    left_out: tuple[str, ...]
    """Files of the directory that belong to no bundle, which were not pushed."""


def push(
    output: Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    unverified: bool = False,
    replace: bool = False,
    license: str | None = None,
    base_model: str | None = None,
) -> Pushed:
    """Pushes a bundle, or all bundles of a directory, with a generated model card. The repository is created if needed.

    The token is that of `hf auth login` or of the environment variable `HF_TOKEN`.

    Args:
        output: What an export has written: a bundle of either layout, or a folder with one for each precision.
        repository: `owner/name`.
        private: Whether a new repository is private; an existing one stays as it is.
        revision: Branch to push to, created if needed; None is the default one.
        unverified: Whether to push what was not verified; the card then says so.
        replace: Whether to delete files of other bundles that are in the repository.
        license: Identifier of the licence; None takes the checkpoint's own.
        base_model: Hub id of the checkpoint; None takes what the export has recorded.

    Raises:
        InputError: `repository` is no name of one, the licence is not known, or the repository has other bundles.
        BundleError: `output` is no bundle, or a file is not what its description says.
        VerificationError: A bundle was not verified.
        HubAccessError: There is no token, or the hub refuses it.
        HubError: The hub refuses something else, or could not be reached. Nothing is published then.
    """
    hub.check_repository(repository)
    folders = _bundle_folders(output)
    files = {f"{prefix}{name}": path for prefix, each in folders.items() for name, path in _files(each).items()}
    published = [Published(each, _num_bytes(_files(each)), find_missing(each)) for each in folders.values()]
    if not unverified:
        _check_verified(published)
    api = _connect()
    with _errors(repository):
        base_model = base_model or _base_model(published[0].bundle)
        license = license or _license(api, published[0].bundle, base_model)
        card = make_card(repository, published, license=license, base_model=base_model, revision=revision).encode()
        commit = _commit(api, repository, files, card, private=private, revision=revision, replace=replace)
    left_out = _left_out(output, files)
    return Pushed(repository, commit, (CARD, *files), _num_bytes(files) + len(card), left_out)


# ------------------------------------------------------------------------------------------------------ what is pushed


def _bundle_folders(output: Path) -> dict[str, Bundle]:
    """All bundles in a directory, by the prefix of their files in the repository; every file is checked."""
    several = sorted(entry.parent.name for entry in output.glob(f"*/{bundles.DESCRIPTION}"))
    if several and not (output / bundles.DESCRIPTION).is_file():
        found = {f"{name}/": bundles.read(output, name) for name in several}
    else:
        found = {"": bundles.read(output, _transformers_js_precision(output))}
    for bundle in found.values():
        bundles.check_files(bundle.path, _recorded(bundle), max_hashed_bytes=None)
    return found


def _transformers_js_precision(output: Path) -> str | None:
    """The precision of a directory in the layout of transformers.js; None for other layouts."""
    names = [
        name for name in precisions.JS_SUFFIXES if (output / precisions.js_file(precisions.VISION, name)).is_file()
    ]
    if len(names) > 1:
        raise BundleFormatError(f"{output}/onnx has several precisions ({', '.join(names)}); push an export of one")
    return names[0] if names else None


def _recorded(bundle: Bundle) -> dict[str, Any]:
    if bundle.layout != "florence_onnx":
        return {}
    found: dict[str, Any] = read_json(bundle.path / bundles.DESCRIPTION).get("files", {})
    return found


def _files(bundle: Bundle) -> dict[str, Path]:
    """Files of a bundle by their names in it: those that its description records, and those beside them."""
    if bundle.layout == "florence_onnx":
        names = [*_recorded(bundle), bundles.DESCRIPTION, bundles.CONFIGURED, own_tasks.TASKS_FILE]
    else:
        names = [path.relative_to(bundle.path).as_posix() for path in _transformers_js_files(bundle.path)]
    return {name: bundle.path / name for name in names if (bundle.path / name).is_file()}


def _transformers_js_files(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("*.json"))
    yield from sorted(folder.glob("*.txt"))
    yield from sorted(folder.glob("onnx/*.onnx*"))


def _num_bytes(files: dict[str, Path]) -> int:
    return sum(path.stat().st_size for path in files.values())


def _left_out(output: Path, files: dict[str, Path]) -> tuple[str, ...]:
    pushed = {path.resolve() for path in files.values()}
    others = (path for path in sorted(output.rglob("*")) if path.is_file() and path.resolve() not in pushed)
    return tuple(path.relative_to(output).as_posix() for path in others)


# -------------------------------------------------------------------------------------------------------- verification


def find_missing(bundle: Bundle) -> str | None:
    """What a bundle's verification lacks, as a phrase; None if every graph and the answers were compared."""
    verification = bundle.verification
    graphs, tokens = verification.get("graphs") or {}, verification.get("tokens") or {}
    names = [path.name for path in bundle.graphs.values()] + [each.graph for each in bundle.encoders]
    absent = [name for name in dict.fromkeys(names) if name not in graphs]
    if not verification:
        return "it has no record of a verification"
    if absent:
        return f"{', '.join(absent)} was not compared with the checkpoint"
    if not tokens:
        return "no answers were compared with the checkpoint's"
    others = [name for name, found in tokens.items() if found["equal"] != found["total"]]
    if bundle.precision == "fp32" and others:
        return f"in fp32 tokens differ from the checkpoint's ({', '.join(others)})"
    return None


def _check_verified(published: Sequence[Published]) -> None:
    for each in published:
        if each.missing is not None:
            raise VerificationError(
                f"{each.bundle.path} is not pushed: {each.missing}. Export it again, or push it as it is with "
                "--unverified; its model card then says so"
            )


# -------------------------------------------------------------------------------------------------- licence and origin


def _base_model(bundle: Bundle) -> str | None:
    recorded = bundle.source.get("base_model")
    name = str(bundle.source.get("name", ""))
    return str(recorded) if recorded else name if "/" in name else None


def _license(api: HfApi, bundle: Bundle, base_model: str | None) -> str:
    """The checkpoint's licence: what the export has recorded, or else what the hub says."""
    found = bundle.source.get("license") or (_license_on_hub(api, base_model) if base_model else None)
    if not found:
        name = base_model or bundle.source.get("name", "the checkpoint")
        raise InputError(f"the licence of {name} is not known; give it with --license, such as --license mit")
    return str(found)


def _license_on_hub(api: HfApi, name: str) -> str | None:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        card = api.model_info(name, timeout=_TIMEOUT).card_data
    except RepositoryNotFoundError:  # it was removed, or renamed
        return None
    return card.get("license") if card else None


# ------------------------------------------------------------------------------------------------------------- the hub

_TIMEOUT = 30.0
"""Seconds for a question to the hub."""


def _connect() -> HfApi:
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise HubAccessError("no token of the hub: log in with hf auth login, or set HF_TOKEN to one that may write")
    # the client itself reads the variable only when it is imported
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


def _commit(
    api: HfApi,
    repository: str,
    files: dict[str, Path],
    card: bytes,
    *,
    private: bool,
    revision: str | None,
    replace: bool,
) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api.create_repo(repository, private=private, exist_ok=True)
    if revision not in (None, DEFAULT_BRANCH):
        api.create_branch(repository, branch=revision, exist_ok=True)
    others = _other_bundles(api.list_repo_files(repository, revision=revision), files)
    if others and not replace:
        raise InputError(
            f"{repository} has files of another bundle ({', '.join(others[:3])}{', …' if len(others) > 3 else ''}), "
            "which would be loaded with this one: push to another repository or --revision, or delete them with --replace"
        )
    operations = [
        CommitOperationAdd(CARD, card),
        *(CommitOperationAdd(name, path) for name, path in files.items()),
        *(CommitOperationDelete(name) for name in others),
    ]
    message = "Push a bundle of florence_onnx"
    return str(api.create_commit(repository, operations, commit_message=message, revision=revision).oid)


def _other_bundles(names: Sequence[str], files: dict[str, Path]) -> list[str]:
    """Files of a repository that a bundle consists of, and that this push does not overwrite."""
    is_ours = [name.rpartition("/")[2] in _BUNDLE_NAMES or ".onnx" in name for name in names]
    return [name for name, ours in zip(names, is_ours, strict=True) if ours and name not in files]


@contextlib.contextmanager
def _errors(repository: str) -> Iterator[None]:
    """Turns the errors of the hub's client into those of this package."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except FlorenceError:
        raise
    # the client raises RuntimeError for a file that it could not upload
    except (HfHubHTTPError, *hub.connection_errors(), RuntimeError, ValueError) as error:
        status = hub.status_of(error)
        if status in hub.REFUSALS:
            raise HubAccessError(
                f"the hub refuses the token for {repository} ({status}): it is wrong, or may not write there. Log in "
                "with hf auth login, or set HF_TOKEN"
            ) from error
        raise HubError(f"the push to {repository} did not finish ({_reason(error)}); {AGAIN}") from error


def _reason(error: BaseException) -> str:
    """What an error of the client says, with what caused it, in one line."""
    parts = [str(error) or type(error).__name__]
    if error.__cause__ is not None and isinstance(error, RuntimeError):
        parts.append(str(error.__cause__))
    return " ".join(" ".join(parts).split())[:300]
