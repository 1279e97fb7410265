"""Tasks that a bundle carries: the file `tasks.json` beside its description.

```json
{"tasks": [{"slug": "generate-tags", "token": "<GENERATE_TAGS>", "prompt": "<GENERATE_TAGS>", "needs": "nothing",
            "parser": "pure_text", "description": "Tags in danbooru style."}]}
```

Its hash is recorded nowhere, so it may be written by hand, also beside an export in the layout of transformers.js. A bundle
may come from anybody, so everything in it is checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from florence_onnx.answers.postprocess import PARSERS, pure_text
from florence_onnx.bundles.json_files import read_json
from florence_onnx.bundles.task_presets import PRESETS
from florence_onnx.errors import BundleFormatError, InputError
from florence_onnx.tasks import NEEDS, TASKS, Task

TASKS_FILE = "tasks.json"
MAX_BYTES = 2**18
"""Largest `tasks.json` that is read."""
MAX_TASKS = 64
MAX_LENGTHS = {"slug": 64, "token": 64, "prompt": 2000, "description": 300}
"""Most characters of each text."""
RESERVED = frozenset({"requests", "prompt"})
"""Slugs that mean something else: a part of the URLs of fal's queue, and what a raw prompt is called."""

_SLUG = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_TOKEN = re.compile(r"<(?!loc_\d+>)[A-Za-z][\w.:+-]*>", re.ASCII)
_REQUIRED = ("slug", "token", "prompt", "needs", "parser")
_ALLOWED = (*_REQUIRED, "description")


def read(directory: Path) -> dict[str, Task[Any]]:
    """The tasks that a bundle carries, by slug; none where it has no `tasks.json`.

    Raises:
        BundleFormatError: The file is not as this module describes it.
    """
    path = directory / TASKS_FILE
    return read_file(path) if path.is_file() else {}


def read_file(path: Path) -> dict[str, Task[Any]]:
    """Reads a file of tasks.

    Raises:
        BundleFileMissingError: There is no such file.
        BundleFormatError: As for `read`; the message names the entry and what is allowed.
    """
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise BundleFormatError(f"{path} has {path.stat().st_size} bytes; a file of tasks has at most {MAX_BYTES}")
    try:
        return parse(read_json(path))
    except InputError as error:
        raise BundleFormatError(f"{path}: {error}") from error


def parse(content: Mapping[str, Any]) -> dict[str, Task[Any]]:
    """Reads the content of a file of tasks.

    Raises:
        InputError: It is not as this module describes it.
    """
    if unknown := set(content) - {"tasks"}:
        raise InputError(f'a file of tasks has one name, "tasks"; got also {_list(sorted(unknown))}')
    entries = content.get("tasks")
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_TASKS:
        raise InputError(f'"tasks" must be a list of 1 to {MAX_TASKS} tasks, got {_shorten(entries)}')
    return collect([_parse_entry(number, entry) for number, entry in enumerate(entries)])


def collect(tasks: Sequence[Task[Any]]) -> dict[str, Task[Any]]:
    """Tasks by slug, in order.

    Raises:
        InputError: Two have the same slug or token, or one has that of a task of Florence-2.
    """
    taken = {name: f"Florence-2's own task {task.slug}" for task in TASKS.values() for name in (task.slug, task.token)}
    for number, task in enumerate(tasks):
        for name, value in (("slug", task.slug), ("token", task.token)):
            if value in taken:
                raise InputError(f"tasks[{number}]: {name} {value!r} is that of {taken[value]}; choose another")
            taken[value] = f"tasks[{number}]"
    return {task.slug: task for task in tasks}


def gather(names: Sequence[str]) -> dict[str, Task[Any]]:
    """The tasks of several presets and files, as `florence-onnx-export --task` takes them.

    Args:
        names: Each the name of a preset, or the path of a JSON file.

    Raises:
        BundleFormatError: A file is not as this module describes it.
        InputError: A name is neither, or tasks contradict each other.
    """
    found: list[Task[Any]] = []
    for name in names:
        found += _find(name)
    return collect(list(dict.fromkeys(found)))  # presets share tasks


def _find(name: str) -> list[Task[Any]]:
    if name in PRESETS:
        return list(PRESETS[name].tasks)
    if not Path(name).is_file():
        raise InputError(
            f"{name!r} is neither a JSON file of tasks nor a preset; the presets are: {', '.join(PRESETS)}"
        )
    return list(read_file(Path(name)).values())


def to_json(tasks: Mapping[str, Task[Any]]) -> dict[str, Any]:
    """The content of a file of tasks, as `parse` reads it."""
    return {"tasks": [_to_entry(task) for task in tasks.values()]}


def _to_entry(task: Task[Any]) -> dict[str, str]:
    parser = next((name for name, parser in PARSERS.items() if parser is task.parser), None)
    if parser is None:
        raise InputError(
            f"task {task.slug!r} has a parser of its own, which a file cannot hold; use one of {_list(PARSERS)}"
        )
    entry = {"slug": task.slug, "token": task.token, "prompt": task.prompt, "needs": task.needs, "parser": parser}
    return {**entry, "description": task.description} if task.description else entry


def _parse_entry(number: int, entry: object) -> Task[Any]:
    where = f"tasks[{number}]"
    if not isinstance(entry, dict):
        raise InputError(f"{where} must be an object with {_list(_REQUIRED)}, got {_shorten(entry)}")
    missing, unknown = set(_REQUIRED) - set(entry), set(entry) - set(_ALLOWED)
    if missing or unknown:
        problem = f"lacks {_list(sorted(missing))}" if missing else f"has an unknown {_list(sorted(unknown))}"
        raise InputError(f"{where} {problem}; a task has {_list(_REQUIRED)}, and may have a description")
    values = {name: _read_text(f"{where}: {name}", name, value) for name, value in entry.items()}
    _check_choice(where, "needs", values["needs"], NEEDS)
    _check_choice(where, "parser", values["parser"], PARSERS)
    _check_names(where, values)
    parser = PARSERS[values.pop("parser")]
    try:
        return Task(**values, parser=parser, has_image=parser is not pure_text)  # type: ignore[arg-type]
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _read_text(where: str, name: str, value: object) -> str:
    limit = MAX_LENGTHS.get(name, 64)
    if not isinstance(value, str) or not value.strip() or len(value) > limit:
        raise InputError(f"{where} must be a text of 1 to {limit} characters, got {_shorten(value)}")
    # control characters would reach terminals, and lone surrogates the tokenizer
    if not (value.replace("\n", "") if name == "prompt" else value).isprintable():
        raise InputError(f"{where} must have printable characters only, got {_shorten(value)}")
    return value


def _check_choice(where: str, name: str, value: str, allowed: Sequence[str] | Mapping[str, Any]) -> None:
    if value not in allowed:
        raise InputError(f"{where}: {name} must be one of {_list(allowed)}; got {value!r}")


def _check_names(where: str, values: Mapping[str, str]) -> None:
    if not _SLUG.fullmatch(values["slug"]) or values["slug"] in RESERVED:
        raise InputError(
            f"{where}: slug must be small letters and digits with single hyphens between, such as my-task, and none of "
            f"{_list(sorted(RESERVED))}; got {values['slug']!r}"
        )
    if not _TOKEN.fullmatch(values["token"]):
        raise InputError(
            f"{where}: token must be a name in angle brackets, such as <MY_TASK>, and no location token; "
            f"got {values['token']!r}"
        )


def _list(names: Iterable[object]) -> str:
    return ", ".join(str(name)[:64] for name in names)[:500]


def _shorten(value: object) -> str:
    if isinstance(value, list | dict):
        return f"{type(value).__name__} of {len(value)}"
    shown = repr(value if not isinstance(value, str) else value[:60])
    return shown[:80]
