"""A cache of optimised graphs on disk, for a faster start; off by default.

At every start ONNX Runtime optimises the graph and packs the weights for the kernels of this CPU. With the cache it
does so once, and later starts map the result into memory: loading takes half the time if the files are in the page
cache (and as long as before if they are not), and processes share one copy. The price is disk space: 2.0 GiB for
Florence-2-base in fp32. Measurements: benchmarks/results/session_options.md.

An entry is a directory, which is written under a temporary name and renamed, so that several processes may start at
once. Its final name is a hash of everything that it depends on: an entry is never out of date, only unused. When all
entries exceed `MAX_BYTES`, the least recently used are removed; the whole folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from florence_onnx.errors import BundleError, DeviceMemoryError, InputError
from florence_onnx.runtime import cpu

_log = logging.getLogger("florence_onnx")

ENVIRONMENT = "FLORENCE_ONNX_GRAPH_CACHE"
"""Environment variable for the folder: `1` for the default folder, `0` or empty for no cache."""
MAX_BYTES = 12 * 2**30
"""Most bytes of all entries together: room for two models of the large size in fp32."""
FORMAT = 1
"""Version of the entries' layout."""
GRAPH, WEIGHTS, FACTS = "graph.onnx", "weights.data", "facts.json"
DESCRIPTION = "florence_onnx.json"

_IRRELEVANT = ("intra_op_num_threads", "inter_op_num_threads", "spinning", "log_", "logid", "profil")
"""Parts of the names of session options that do not change the optimised graph."""
_SAVE = {
    "session.optimized_model_external_initializers_file_name": WEIGHTS,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    "session.save_external_prepacked_constant_initializers": "1",
}

Create = Callable[[Path, Mapping[str, Any]], Any]
"""Opens a session for a graph file, with further session options."""


def folder(choice: bool | str | os.PathLike[str] | None) -> Path | None:
    """The folder of the cache, or None for no cache.

    Args:
        choice: A folder, True for the default one, False for no cache, None for what the environment variable says.

    Raises:
        InputError: `choice` is none of these.
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
    """`florence_onnx/graphs` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "florence_onnx" / "graphs"


def load(
    graph: Path, cache_folder: Path, options: Mapping[str, Any], *, runtime: str, no_optimization: Any, create: Create
) -> Any:
    """Opens a session from the cache entry of a graph; without an entry from the graph itself, and writes one.

    Args:
        graph: An ONNX file of a bundle.
        cache_folder: The folder of all entries.
        options: All session options.
        runtime: Version of ONNX Runtime.
        no_optimization: Value of `graph_optimization_level` for a graph that is optimised already.
        create: Opens a session.

    Returns:
        The session. Problems with the cache are logged and never raised.

    Raises:
        InputError: The options save the optimised graph elsewhere.
        FlorenceError: The graph itself does not load.
    """
    if options.get("optimized_model_filepath"):
        raise InputError("optimized_model_filepath and graph_cache exclude each other: both save the optimised graph")
    entry = cache_folder / key(graph, options, runtime)
    if entry.is_dir():
        try:
            _check(entry)
            session = create(entry / GRAPH, {"graph_optimization_level": no_optimization})
            os.utime(entry)
        except (BundleError, OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("graph cache: entry %s of %s is damaged and is written again: %s", entry, graph.name, error)
            _remove(entry)
        else:
            _log.info("graph cache: %s loaded from %s", graph.name, entry)
            return session
    return _create_entry(graph, entry, create)


def key(graph: Path, options: Mapping[str, Any], runtime: str) -> str:
    """Name of a graph's entry: a hash of the bundle's files, the session options, the runtime and the CPU.

    Of the files it takes the hashes in the bundle's description, and also size and modification time, which change when
    a file is replaced and the description is not.
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


def _create_entry(graph: Path, entry: Path, create: Create) -> Any:
    """Opens a session from a graph and writes its entry; where that fails, without the entry."""
    import tempfile

    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=entry.parent))
    except OSError as error:
        _log.warning("graph cache: %s cannot be cached: %s", graph.name, error)
        return create(graph, {})
    try:
        session = create(graph, {"optimized_model_filepath": str(new / GRAPH), **_SAVE})
        _commit(new, entry)
        _log.info("graph cache: %s saved to %s", graph.name, entry)
        _evict(entry.parent)
    except (BundleError, DeviceMemoryError, OSError) as error:  # a full disk raises the first or the last of them
        session = create(graph, {})  # raises again if the graph itself is the reason
        _log.warning("graph cache: %s cannot be cached: %s", graph.name, error)
    finally:
        _remove(new)  # does not exist any more if it was renamed
    return session


def _commit(new: Path, entry: Path) -> None:
    """Adds the file by which `_check` finds damage, and gives the directory its final name."""
    facts = {
        "sizes": {path.name: path.stat().st_size for path in new.iterdir()},
        "sha256": hashlib.sha256((new / GRAPH).read_bytes()).hexdigest(),
    }
    (new / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    try:
        new.rename(entry)
    except OSError:
        if not entry.is_dir():  # otherwise another process was faster, and has written the same
            raise


def _check(entry: Path) -> None:
    """Checks that an entry is as it was written; weights by size only, since hashing gigabytes would take too long.

    Raises:
        ValueError: A file has changed.
        OSError: A file is missing or cannot be read.
        KeyError: The facts are incomplete.
        TypeError: The facts are of another type.
    """
    facts = json.loads((entry / FACTS).read_text(encoding="utf-8"))
    for name, size in facts["sizes"].items():
        if (entry / name).stat().st_size != size:
            raise ValueError(f"the size of {name} has changed")
    if hashlib.sha256((entry / GRAPH).read_bytes()).hexdigest() != facts["sha256"]:
        raise ValueError(f"the content of {GRAPH} has changed")


def _evict(cache_folder: Path) -> None:
    """Removes the least recently used entries beyond `MAX_BYTES`; processes that have mapped them are not disturbed."""
    entries = sorted(
        (path for path in cache_folder.iterdir() if (path / FACTS).is_file()), key=lambda path: path.stat().st_mtime
    )
    sizes = [sum(file.stat().st_size for file in path.iterdir()) for path in entries]
    total = sum(sizes)
    for path, size in zip(entries[:-1], sizes, strict=False):  # never the newest, which was just written
        if total <= MAX_BYTES:
            return
        _log.info("graph cache: %s removed, %d bytes over the limit", path, total - MAX_BYTES)
        _remove(path)
        total -= size


def _remove(path: Path) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)
