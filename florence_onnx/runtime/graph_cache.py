"""Optimised graphs kept on disk for the next start; off unless asked for.

What ONNX Runtime does at every start, it then does once: it optimises the graph and packs the weights for the kernels of this
processor. Later starts map the result into memory: loading takes half the time when the files are in the page cache (and no
less when they are not), and several processes share one copy. The price is disk: Florence-2-base in fp32 takes
2.0 GiB. Figures are in benchmarks/results/session_options.md.

An entry is a directory, written beside its place and renamed, so that processes may start at the same time. Its name is a
hash of all that it depends on: an entry is never out of date, only unused. The least recently used go when all
together exceed `MAX_BYTES`; deleting the folder is always safe.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from florence_onnx.errors import BundleError, InputError
from florence_onnx.runtime import cpu

_log = logging.getLogger("florence_onnx")

ENVIRONMENT = "FLORENCE_ONNX_GRAPH_CACHE"
"""Environment variable for the folder; `1` is the default folder, empty or `0` is none."""
MAX_BYTES = 12 * 2**30
"""Of all entries together: two models of the large size in fp32."""
FORMAT = 1
GRAPH, WEIGHTS, FACTS = "graph.onnx", "weights.data", "facts.json"
DESCRIPTION = "florence_onnx.json"

_IRRELEVANT = ("intra_op_num_threads", "inter_op_num_threads", "spinning", "log_", "logid", "profil")
"""Parts of session options' names that change nothing of the optimised graph."""
_SAVE = {
    "session.optimized_model_external_initializers_file_name": WEIGHTS,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    "session.save_external_prepacked_constant_initializers": "1",
}

Create = Callable[[Path, Mapping[str, Any]], Any]
"""Makes a session of a graph file, with these session options over the others."""


def folder(choice: bool | str | os.PathLike[str] | None) -> Path | None:
    """Where entries go.

    Args:
        choice: A folder, True for the default one, False for none, None for what the environment says.
    """
    if choice is None:
        choice = os.environ.get(ENVIRONMENT) or False
        choice = {"0": False, "1": True}.get(str(choice), choice)
    if isinstance(choice, bool):
        return default_folder() if choice else None
    if not isinstance(choice, str | os.PathLike) or not os.fspath(choice):
        raise InputError(f"graph_cache must be a folder, True, False or None, got {choice!r}")
    return Path(choice).expanduser()


def default_folder() -> Path:
    """`florence_onnx/graphs` in the user's folder for caches."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "florence_onnx" / "graphs"


def load(
    graph: Path, kept: Path, options: Mapping[str, Any], *, runtime: str, no_optimization: Any, create: Create
) -> Any:
    """Makes a session from the entry of a graph, or from the graph itself, which then becomes an entry.

    Args:
        graph: An ONNX file of a bundle.
        kept: The folder of all entries.
        options: All session options.
        runtime: Version of ONNX Runtime.
        no_optimization: Value of `graph_optimization_level` for a graph that is optimised already.
        create: Makes a session.

    Returns:
        The session. Whatever is wrong with the cache is logged and never an error.

    Raises:
        FlorenceError: The graph itself does not load.
    """
    if options.get("optimized_model_filepath"):
        raise InputError("optimized_model_filepath and graph_cache exclude each other: both write the optimised graph")
    entry = kept / key(graph, options, runtime)
    if entry.is_dir():
        try:
            _check(entry)
            session = create(entry / GRAPH, {"graph_optimization_level": no_optimization})
            os.utime(entry)
        except (BundleError, OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("graph cache: %s of %s cannot be used and is made anew: %s", entry, graph.name, error)
            _remove(entry)
        else:
            _log.info("graph cache: %s from %s", graph.name, entry)
            return session
    return _make(graph, entry, create)


def key(graph: Path, options: Mapping[str, Any], runtime: str) -> str:
    """Name of a graph's entry: a hash of the bundle's files, the options, the runtime and the processor.

    Content counts by the hashes in the bundle's description, and size and time of all files, which
    notice what was replaced without it.
    """
    files = sorted(path for path in graph.parent.iterdir() if path.is_file() and path.suffix != ".json")
    description = graph.parent / DESCRIPTION
    facts = {
        "format": FORMAT,
        "graph": graph.name,
        "description": description.read_text(encoding="utf-8") if description.is_file() else "",
        "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "options": sorted(
            [name, str(value)] for name, value in options.items() if not any(part in name for part in _IRRELEVANT)
        ),
        "runtime": runtime,
        "processor": [cpu.name(), sorted(cpu.flags())],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _make(graph: Path, entry: Path, create: Create) -> Any:
    import tempfile

    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=entry.parent))
    except OSError as error:
        _log.warning("graph cache: %s cannot be kept: %s", graph.name, error)
        return create(graph, {})
    try:
        session = create(graph, {"optimized_model_filepath": str(new / GRAPH), **_SAVE})
        _finish(new, entry)
        _log.info("graph cache: %s kept in %s", graph.name, entry)
        _drop_oldest(entry.parent)
    except (BundleError, OSError) as error:  # a full disk comes as either
        session = create(graph, {})  # raises if the graph itself is the reason
        _log.warning("graph cache: %s cannot be kept: %s", graph.name, error)
    finally:
        _remove(new)  # renamed, if all went well
    return session


def _finish(new: Path, entry: Path) -> None:
    facts = {
        "sizes": {path.name: path.stat().st_size for path in new.iterdir()},
        "sha256": hashlib.sha256((new / GRAPH).read_bytes()).hexdigest(),
    }
    (new / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    try:
        new.rename(entry)
    except OSError:
        if not entry.is_dir():  # else another process was faster, with the same content
            raise


def _check(entry: Path) -> None:
    """Raises ValueError, or what reading raises, for an entry that is not as it was written.

    The weights are compared by size: reading gigabytes would cost more than the cache saves.
    """
    facts = json.loads((entry / FACTS).read_text(encoding="utf-8"))
    for name, size in facts["sizes"].items():
        if (entry / name).stat().st_size != size:
            raise ValueError(f"{name} has another size than it was written with")
    if hashlib.sha256((entry / GRAPH).read_bytes()).hexdigest() != facts["sha256"]:
        raise ValueError(f"{GRAPH} has another content than it was written with")


def _drop_oldest(kept: Path) -> None:
    """Removes the least recently used entries beyond `MAX_BYTES`; who has them open keeps them."""
    entries = sorted(
        (path for path in kept.iterdir() if (path / FACTS).is_file()), key=lambda path: path.stat().st_mtime
    )
    sizes = [sum(file.stat().st_size for file in path.iterdir()) for path in entries]
    total = sum(sizes)
    for path, size in zip(entries[:-1], sizes, strict=False):  # never the one just made
        if total <= MAX_BYTES:
            return
        _log.info("graph cache: %s removed, %d bytes over the limit", path, total - MAX_BYTES)
        _remove(path)
        total -= size


def _remove(path: Path) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)
