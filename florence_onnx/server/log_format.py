"""The log on standard error: a JSON object a line for machines, or text for people."""

from __future__ import annotations

import logging
import sys
import unicodedata
from typing import Literal

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

LogFormat = Literal["json", "text"]


def configure_logging(log_format: LogFormat) -> None:
    """Sends the logs of this package and of uvicorn to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(log_format))
    for name in ("florence_onnx", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _formatter(log_format: LogFormat) -> logging.Formatter:
    if log_format == "text":
        return TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    fields = "%(asctime)s %(levelname)s %(name)s %(message)s"
    return JsonFormatter(
        fields,
        rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # uvicorn's message with terminal colours
    )


class TextFormatter(logging.Formatter):
    """One line a message. What a client sent can neither begin a line of its own nor control the terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name of logging
        """Formats all but the traceback."""
        record.message = escape(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:  # noqa: N802
        """Formats a traceback, indented: the error in it may quote a client."""
        return _indented(super().formatException(ei))  # type: ignore[arg-type]

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        """Formats a stack like a traceback."""
        return _indented(super().formatStack(stack_info))


def escape(text: str) -> str:
    """Writes control characters, line separators and marks of direction as Python escapes: ESC becomes `\\x1b`."""
    return "".join(each if _is_harmless(each) else each.encode("unicode_escape").decode("ascii") for each in text)


def _is_harmless(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _indented(text: str) -> str:
    return "\n".join(f"    {escape(line)}" for line in text.split("\n"))
