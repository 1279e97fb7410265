"""The endpoints of `fal-ai/florence-2-large` and the validation of their arguments.

Shared by the in-process client and the server, so that both accept and reject the same requests. Unknown fields are
ignored, as fal does; those of `extensions` are our own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from florence_onnx import tasks
from florence_onnx.answers.locations import NUM_BINS, Region
from florence_onnx.errors import OptionsError, RegionError, TextInputError
from florence_onnx.fal import extensions, problems
from florence_onnx.fal.extensions import Extensions
from florence_onnx.fal.problems import field_error
from florence_onnx.generation.option_names import is_option, parse_options
from florence_onnx.generation.options import GenerationOptions, merge
from florence_onnx.tasks import Task

APP = "fal-ai/florence-2-large"
"""Prefix of all endpoint ids."""
MAX_BIN = NUM_BINS - 1
"""Largest coordinate of a region, a bin of 1/1000 of the image's width or height."""
MISSING = "missing"
"""fal's error type for an absent field."""
DEFAULT_OPTIONS = GenerationOptions()
"""The defaults of the bundle."""


@dataclass(frozen=True)
class TooLong:
    """Stands for a string of a request that was not read, because no field may be that long; see `server.bodies`."""

    num_bytes: int
    """UTF-8 bytes of the string, its JSON escapes included."""


@dataclass(frozen=True)
class Arguments:
    """The validated arguments of a request. The image has not been read yet."""

    task: Task[Any]
    image_url: str
    """An `http(s)` URL or a `data:` URI; not validated here."""
    text_input: str | None = None
    """None for tasks that take no text."""
    region: Region | None = None
    """None for tasks that take no region."""
    options: GenerationOptions = DEFAULT_OPTIONS
    extensions: Extensions = extensions.NOTHING
    """Fields that fal's API does not have."""


def find_task(application: str, known: Mapping[str, Task[Any]] = tasks.TASKS) -> Task[Any]:
    """Finds the task of an endpoint id.

    Args:
        application: Such as `fal-ai/florence-2-large/object-detection`.
        known: The model's tasks by slug; fal's by default.

    Raises:
        RequestError: 404, there is no such endpoint.
    """
    app, _, slug = application.strip("/").rpartition("/")
    if app != APP or slug not in known:
        raise problems.not_found(application)
    return known[slug]


def read_arguments(
    task: Task[Any],
    arguments: object,
    options: GenerationOptions = DEFAULT_OPTIONS,
    check_options: Callable[[GenerationOptions], None] | None = None,
    check_text_bytes: Callable[[int], None] | None = None,
) -> Arguments:
    """Validates the arguments of a request.

    Args:
        task: The task of the endpoint.
        arguments: The decoded JSON of the request.
        options: Generation options of all requests.
        check_options: Raises OptionsError where options cannot be used; None where requests may not state any: such fields are
            then ignored, like all unknown ones.
        check_text_bytes: Raises TextInputError if no prompt can hold a text of that many UTF-8 bytes.

    Raises:
        RequestError: 422, with one entry for each missing or invalid field.
    """
    if not isinstance(arguments, Mapping):
        raise problems.invalid([field_error([], "Input should be a valid dictionary", "dict_type")])
    errors: list[dict[str, Any]] = []
    image_url = _read_text(arguments, "image_url", errors)
    extended = extensions.read(task, arguments, errors, check_text_bytes)
    # with classes the text is checked if there is one, as its schema says, but not read
    takes_text = task.takes_text and ("text_input" in arguments or arguments.get("classes") is None)
    text_input = _read_text(arguments, "text_input", errors, check_text_bytes) if takes_text else None
    region = _read_region(_with_region(task, arguments), errors) if task.takes_region else None
    if not errors and not extended.classes:
        errors += _check_content(task, text_input, region)
    if check_options is not None:
        options = _read_options(arguments, options, check_options, errors)
    if errors:
        raise problems.invalid(errors)
    text_input = None if extended.classes else text_input
    return Arguments(task, image_url, text_input, region, extended.add_options(options), extended)


def _read_options(
    arguments: Mapping[str, Any],
    options: GenerationOptions,
    check: Callable[[GenerationOptions], None],
    errors: list[dict[str, Any]],
) -> GenerationOptions:
    """The options that a request states over those of all requests; other fields are ignored, as everywhere."""
    given = {name: value for name, value in arguments.items() if is_option(name)}
    if not given:
        return options
    try:
        found = merge(options, parse_options(given))
        check(found)
    except OptionsError as error:
        named = next((name for name in given if name in str(error)), next(iter(given)))
        errors.append(field_error([named], str(error), "value_error"))
        return options
    return found


def _read_text(
    arguments: Mapping[str, Any],
    name: str,
    errors: list[dict[str, Any]],
    check_bytes: Callable[[int], None] | None = None,
) -> str:
    given = arguments.get(name)
    if name not in arguments:
        errors.append(field_error([name], "Field required", MISSING))
    elif not isinstance(given, str | TooLong):
        errors.append(field_error([name], "Input should be a valid string", "string_type"))
    elif (problem := _too_long(given, check_bytes)) is not None:
        errors.append(field_error([name], problem, "string_too_long"))
    else:
        return str(given)
    return ""


def _with_region(task: Task[Any], arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments with a region that stands, as Microsoft's users write it, in the text of a task that takes none."""
    text = arguments.get("text_input")
    if "region" in arguments or task.takes_text or not isinstance(text, str):
        return arguments
    written = text.strip().removeprefix(task.token)
    return {**arguments, "region": written} if Region.is_text(written) else arguments


def _too_long(given: str | TooLong, check_bytes: Callable[[int], None] | None) -> str | None:
    """What is wrong with the length of a string, None for nothing."""
    if isinstance(given, str) and check_bytes is None:
        return None
    num_bytes = len(given.encode("utf-8", "surrogatepass")) if isinstance(given, str) else given.num_bytes
    try:
        if check_bytes is not None:
            check_bytes(num_bytes)
    except TextInputError as error:
        return str(error)
    return None if isinstance(given, str) else f"String has {num_bytes:,} bytes; only a data: URI may be that long"


def _read_region(arguments: Mapping[str, Any], errors: list[dict[str, Any]]) -> Region | None:
    if "region" not in arguments:
        errors.append(field_error(["region"], "Field required", MISSING))
        return None
    given = arguments["region"]
    if not isinstance(given, Mapping | str):
        errors.append(field_error(["region"], "Input should be an object with x1, y1, x2 and y2", "dict_type"))
        return None
    bins = [] if isinstance(given, str) else [_read_bin(given, name, errors) for name in ("x1", "y1", "x2", "y2")]
    if errors:
        return None
    try:
        return Region.from_text(given) if isinstance(given, str) else Region(*bins)
    except RegionError as error:
        errors.append(field_error(["region"], str(error), "value_error"))
        return None


def _read_bin(region: Mapping[str, Any], name: str, errors: list[dict[str, Any]]) -> int:
    loc = ["region", name]
    if name not in region:
        errors.append(field_error(loc, "Field required", MISSING))
        return 0
    value = region[name]
    # 100.0 is an integer in JSON; for NaN and infinity, `value // 1` is NaN, which equals nothing
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        errors.append(field_error(loc, "Input should be a valid integer", "int_type"))
    elif value < 0:
        message = f"Input should be greater than or equal to 0 (bins of 0 to {MAX_BIN}, not pixels)"
        errors.append(field_error(loc, message, "greater_than_equal", {"ge": 0}))
    elif value > MAX_BIN:
        message = f"Input should be less than or equal to {MAX_BIN} (bins of 0 to {MAX_BIN}, not pixels)"
        errors.append(field_error(loc, message, "less_than_equal", {"le": MAX_BIN}))
    else:
        return int(value)
    return 0


def _check_content(task: Task[Any], text_input: str | None, region: Region | None) -> list[dict[str, Any]]:
    try:
        task.format_prompt(text_input, region)
    except TextInputError as error:
        return [field_error(["text_input"], str(error), "value_error")]
    return []
