"""Keeps ONNX Runtime from reporting to its makers: to import this module turns the reports off.

ONNX Runtime 1.32 for Linux writes a database and a device id under `~/.cache/Microsoft` when it loads a graph, and looks up
the host that it reports to some seconds later (both seen with strace). It reads `ORT_DISABLE_TELEMETRY` when it is
imported; `onnxruntime.disable_telemetry_events()` does not stop it. Its threads also make a forked child hang when it
exits (`forks`).
"""

from __future__ import annotations

import os
import sys

VARIABLE = "ORT_DISABLE_TELEMETRY"
_ON = ("1", "true", "yes", "on")
"""Values by which ONNX Runtime 1.32 turns the reports off, in upper or lower case; with any other it reports."""


def _turn_off() -> bool:
    """Sets the variable unless it is set, for whoever wants the reports.

    Returns:
        Whether that came too late, because onnxruntime is imported already.
    """
    if VARIABLE in os.environ:
        return False
    os.environ[VARIABLE] = "1"
    return "onnxruntime" in sys.modules


IS_TOO_LATE = _turn_off()
"""Whether onnxruntime was imported before this module, and with the variable unset."""


def problem() -> str | None:
    """Why ONNX Runtime may report to its makers from this process, and what to do; None where it does not."""
    if IS_TOO_LATE:
        return (
            f"may report to its makers (1.32 does): it was imported before florence_onnx, without {VARIABLE}=1; "
            f"import florence_onnx first, or set {VARIABLE}=1"
        )
    if os.environ.get(VARIABLE, "").lower() not in _ON:
        return f"may report to its makers (1.32 does): {VARIABLE} is {os.environ.get(VARIABLE)!r}; set it to 1"
    return None
