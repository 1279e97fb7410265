"""Precisions, one for the whole model or one for each module, and the files that they mean in the layout of transformers.js.

A model in that layout has four modules, each a graph of its own, and for each of them a file per precision:
`onnx/vision_encoder_fp16.onnx`, `onnx/decoder_model_merged_q4.onnx`, … Modules may differ in precision, as transformers.js
allows with a dict as its `dtype`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from florence_onnx.errors import BundleFileMissingError, BundleFormatError, InputError

Precision = str | Mapping[str, str]
"""`"fp16"`, or a dict such as `{"vision_encoder": "fp16", "decoder": "q4"}`. A string of the form
`"vision_encoder=fp16,decoder=q4"` means the same as that dict."""

VISION, EMBEDDING, ENCODER, MERGED = "vision_encoder", "embed_tokens", "encoder_model", "decoder_model_merged"
JS_GRAPHS = (VISION, EMBEDDING, ENCODER, MERGED)
"""The modules of the layout of transformers.js, by the names that its files and its `dtype` have for them."""
_ALIASES = {"encoder": ENCODER, "text_encoder": ENCODER, "decoder": MERGED}

JS_SUFFIXES = {
    "fp32": "",
    "fp16": "_fp16",
    "q8": "_quantized",
    "int8": "_int8",
    "uint8": "_uint8",
    "q4": "_q4",
    "q4f16": "_q4f16",
    "bnb4": "_bnb4",
}
"""File name suffix by precision in the layout of transformers.js."""
JS_DEFAULT = "fp32"
"""The precision of modules for which none is asked."""


def parse(precision: Precision | None) -> str | dict[str, str] | None:
    """Reads the argument `precision`.

    Args:
        precision: As in `Precision`; modules by their names in `JS_GRAPHS`, or `encoder`, `text_encoder` and `decoder`.

    Returns:
        A single precision, or precisions by module in the order of `JS_GRAPHS`, only for those that are given.

    Raises:
        InputError: A module is unknown or given twice, or a value is not a name.
    """
    if precision is None or (isinstance(precision, str) and "=" not in precision):
        return precision
    found: dict[str, str] = {}
    for name, value in _pairs(precision):
        module = _ALIASES.get(name, name)
        if module not in JS_GRAPHS or not isinstance(value, str) or not value:
            raise InputError(f"precision cannot be {precision!r}: {name!r} with {value!r}; {_FORM}")
        if module in found:
            raise InputError(f"precision cannot be {precision!r}: {module} is given twice")
        found[module] = value
    return {module: found[module] for module in JS_GRAPHS if module in found}


_FORM = (
    'it is a name such as "fp16", or names by module such as {"vision_encoder": "fp16", "decoder": "q4"}, on the command line '
    f"vision_encoder=fp16,decoder=q4; modules are {', '.join((*JS_GRAPHS, *_ALIASES))}"
)


def _pairs(precision: object) -> list[tuple[str, object]]:
    if isinstance(precision, str):
        parts = [part.partition("=") for part in precision.split(",")]
        return [(name.strip(), value.strip()) for name, _, value in parts]
    if not isinstance(precision, Mapping) or not precision:
        raise InputError(f"precision cannot be {precision!r}; {_FORM}")
    return list(precision.items())


def js_modules(precision: Precision | None) -> dict[str, str]:
    """The precision of each module in the layout of transformers.js.

    Args:
        precision: As for `parse`; modules that are not named get `JS_DEFAULT`.

    Raises:
        InputError: As for `parse`.
        BundleFormatError: The layout has no such precision.
    """
    asked = parse(precision)
    one = asked if isinstance(asked, str) else JS_DEFAULT
    modules = dict.fromkeys(JS_GRAPHS, one) | (asked if isinstance(asked, dict) else {})
    for value in modules.values():
        if value not in JS_SUFFIXES:
            raise BundleFormatError(
                f"unknown precision {value!r}; the layout of transformers.js has {', '.join(JS_SUFFIXES)}"
            )
    return modules


def js_file(module: str, precision: str) -> str:
    """Path of a graph from the root of the layout, such as `onnx/decoder_model_merged_q4.onnx`."""
    return f"onnx/{module}{JS_SUFFIXES[precision]}.onnx"


def describe(modules: Mapping[str, str]) -> str:
    """The precision of a model as one text, which `parse` reads."""
    values = list(modules.values())
    if len(set(values)) == 1:
        return values[0]
    return ",".join(f"{module}={value}" for module, value in modules.items())


def check_present(modules: Mapping[str, str], names: Iterable[str], place: str) -> None:
    """Checks that a directory or repository has the graph of every module.

    Args:
        modules: Precision by module.
        names: Paths of all files, from the root of the layout.
        place: The directory or repository, for the message.

    Raises:
        BundleFileMissingError: A graph is missing; the message says which graphs there are, and what to pass.
    """
    present = set(names)
    missing = [file for file in (js_file(*pair) for pair in modules.items()) if file not in present]
    if missing:
        raise BundleFileMissingError(f"{place} has no {', '.join(missing)}. {_offer(modules, present)}")


def _offer(modules: Mapping[str, str], present: set[str]) -> str:
    """What there is instead, and what to pass as `precision`."""
    found = {module: [each for each in JS_SUFFIXES if js_file(module, each) in present] for module in JS_GRAPHS}
    has = "; ".join(f"{module}: {', '.join(each) or 'nothing'}" for module, each in found.items())
    if not all(found.values()):
        return f"It has {has}. A model needs all of them: download what is missing"
    complete = [each for each in JS_SUFFIXES if all(each in values for values in found.values())]
    closest = {module: modules[module] if modules[module] in each else each[0] for module, each in found.items()}
    offers = [f'precision="{each}"' for each in dict.fromkeys((*complete, describe(closest)))]
    return f"It has {has}. Pass {' or '.join(offers)}"
