"""The figures of a step, saved after every one, and the errors that end a figure but not its step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime

from florence_onnx.errors import FlorenceError

_ORT_ERRORS = (
    "EPFail",
    "EngineError",
    "Fail",
    "InvalidArgument",
    "InvalidGraph",
    "InvalidProtobuf",
    "NoModel",
    "NoSuchFile",
    "NotImplemented",
    "RuntimeException",
)
_state = onnxruntime.capi.onnxruntime_pybind11_state
FAILURES: tuple[type[BaseException], ...] = (
    FlorenceError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ImportError,
    OSError,
    *(getattr(_state, name) for name in _ORT_ERRORS if hasattr(_state, name)),
)
"""Errors that libraries, a GPU or its memory may cause. ONNX Runtime's classes have no common base class."""
MAX_MESSAGE = 600


class Figures:
    """Named results of one step."""

    def __init__(self, path: Path) -> None:
        """Writes to the JSON file `path` after every figure."""
        self._path = path
        self.found: dict[str, Any] = {}
        self.errors: dict[str, str] = {}

    def add(self, name: str, value: Any) -> None:
        """Records a figure, and prints it."""
        self.found[name] = value
        self._write()
        print(f"  {name}: {_brief(value)}", flush=True)

    def attempt(self, name: str, measure: Callable[[], Any]) -> None:
        """Records the result of a measurement, or its error, after which the step goes on."""
        try:
            self.add(name, measure())
        except FAILURES as error:
            self.errors[name] = f"{type(error).__name__}: {error}"[:MAX_MESSAGE]
            self._write()
            print(f"  {name}: {self.errors[name]}", flush=True)

    def _write(self) -> None:
        content = {"figures": self.found, "errors": self.errors}
        temporary = self._path.with_suffix(".part")
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(self._path)


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_brief(each)}" for name, each in value.items() if name not in ("top", "different"))
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:300]
