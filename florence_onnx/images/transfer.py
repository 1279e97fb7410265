"""What a caller can do to a download while it runs: count its bytes, and end it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable


class Transfer:
    """One download, as seen from other threads."""

    def __init__(self, on_bytes: Callable[[int], None] | None = None) -> None:
        """Prepares a download that has not begun.

        Args:
            on_bytes: Called with the number of bytes of each part of the content; what it raises ends the download.
        """
        self.on_bytes = on_bytes
        self._socket: socket.socket | None = None
        self._is_cancelled = False
        self._lock = threading.Lock()

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._is_cancelled

    def attach(self, sock: socket.socket) -> None:
        """Names the socket that is used from now on.

        Raises:
            OSError: The download was cancelled.
        """
        with self._lock:
            if self._is_cancelled:
                raise OSError("the download was cancelled")
            self._close()
            # a duplicate, because TLS takes the descriptor away from the socket that it wraps
            self._socket = sock.dup()

    def cancel(self) -> None:
        """Ends the download at once; only a look-up of a host's name runs on until the system's own limit."""
        with self._lock:
            self._is_cancelled = True
            if self._socket is not None:
                with contextlib.suppress(OSError):  # it may have ended by itself
                    self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads

    def close(self) -> None:
        """Frees what `attach` took; the download has ended."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
