"""Decodes images in processes of its own, so that decoding can be ended and a fault of a decoder harms nobody else."""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from PIL import Image

from florence_onnx import errors, forks
from florence_onnx.errors import ImageDecodeError, ImageTooLargeError
from florence_onnx.images.decoder_child import INTERNAL, SHARED_BYTES
from florence_onnx.images.opening import MAX_PIXELS, MAX_SIDE, DecodingEndedError
from florence_onnx.images.pixels import PixelBlock

_log = logging.getLogger("florence_onnx")
_CODE = "import sys; sys.path[:] = {path!r}; from florence_onnx.images.decoder_child import main; main({file!r})"
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "LIBTIFF_JPEG_MAX_ALLOWED_SCAN_NUMBER": "32",
}
_KEPT_VARIABLES = ("PATH", "PYTHON", "LD_", "DYLD_", "LANG", "LC_", "SYSTEMROOT", "TEMP", "TMP")
_PIPE_BYTES = 2**20
"""What a pipe holds: with 64 KiB, the default, the two processes would wait for each other 16 times a megabyte."""
SECONDS = 10.0
"""Default limit of decoding one image."""

Admit = Callable[[int, int], None]
"""Called with the bytes that decoding an image will take, and those of its result, before it begins; returns when there is
room, or raises."""


class _Process:
    """A child and the pipes to it."""

    def __init__(self) -> None:
        file = os.memfd_create("florence-onnx-pixels") if hasattr(os, "memfd_create") else None
        self._shared: mmap.mmap | None = None
        if file is not None:
            os.ftruncate(file, SHARED_BYTES)
            self._shared = mmap.mmap(file, SHARED_BYTES)
        self._child = subprocess.Popen(
            [sys.executable, "-c", _CODE.format(path=sys.path, file=file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libtiff writes there what it thinks of strangers' files
            env=_make_environment(),
            start_new_session=True,  # Ctrl-C is for the parent, which finishes what it has accepted
            pipesize=_PIPE_BYTES,
            pass_fds=() if file is None else (file,),
        )
        if file is not None:
            os.close(file)
        assert self._child.stdin is not None and self._child.stdout is not None
        self._to, self._from = self._child.stdin, self._child.stdout
        self.pid = self._child.pid
        self.was_ended = False

    def send(self, message: dict[str, Any], content: bytes = b"") -> None:
        self._to.write(json.dumps(message).encode() + b"\n")
        self._to.write(content)
        self._to.flush()

    def receive(self) -> dict[str, Any]:
        line = self._from.readline()
        if not line:
            raise EOFError
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise _make_error(message["error"], message["message"])
        return message

    def receive_pixels(self, size: tuple[int, int], *, is_shared: bool) -> PixelBlock:
        block = PixelBlock(size)
        view = memoryview(block.memory)[: block.num_bytes]
        if is_shared:
            assert self._shared is not None
            view[:] = memoryview(self._shared)[: len(view)]
            return block
        while view:
            num_bytes = self._from.readinto(view)  # type: ignore[attr-defined]
            if not num_bytes:
                raise EOFError
            view = view[num_bytes:]
        return block

    def kill(self) -> None:
        self.was_ended = True
        with contextlib.suppress(OSError):
            self._child.kill()

    def close(self) -> None:
        self.kill()
        self._child.wait()
        for pipe in (self._to, self._from):
            with contextlib.suppress(OSError):
                pipe.close()

    def is_running(self) -> bool:
        return self._child.poll() is None

    def was_late(self) -> bool:
        """Whether the child, which has ended, ended itself because its time was over."""
        return self._child.wait() == -getattr(signal, "SIGALRM", 0) != 0


class DecoderProcesses:
    """A bounded number of processes that decode. Thread-safe; each call of `decode` occupies one of them.

    Processes are started when they are first needed, and again after one was ended.
    """

    def __init__(
        self,
        num_processes: int,
        *,
        max_pixels: int = MAX_PIXELS,
        max_side: int = MAX_SIDE,
        seconds: float = SECONDS,
    ) -> None:
        """Starts the first process.

        Args:
            num_processes: Most processes.
            max_pixels: Most pixels of an image.
            max_side: Most pixels of its width and of its height.
            seconds: Time limit of decoding an image.
        """
        self._limits = {"max_pixels": max_pixels, "max_side": max_side, "seconds": seconds}
        self._num_processes = num_processes
        self._is_open = True
        self._clear()
        self._idle.append(_Process())
        forks.call_in_child(self._leave_to_parent)

    def _clear(self) -> None:
        self._free = threading.Semaphore(self._num_processes)
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        self._busy: dict[Hashable, _Process] = {}

    def _leave_to_parent(self) -> None:
        """Forgets all processes in a forked child: they answer the parent, and the child starts its own."""
        forks.leak([*self._idle, *self._busy.values()])
        self._clear()

    def decode(self, content: bytes, *, key: Hashable = None, admit: Admit | None = None) -> Image.Image:
        """Decodes an image of one of `opening.FORMATS` to RGB, its EXIF orientation applied.

        Args:
            content: The encoded image.
            key: By which `end` finds this call; no other call of now has it.
            admit: Called once the header was read; None for no such call.

        Raises:
            ImageDecodeError: It is not an image, or damaged, or the process that decoded it ended.
            ImageTooLargeError: It is too large, or takes too long.
            DecodingEndedError: The call was ended.
        """
        with self._free, self._borrow(object() if key is None else key) as process:
            try:
                return self._decode(process, content, admit)
            except (EOFError, OSError) as error:
                if isinstance(error, errors.FlorenceError):  # several of ours are an OSError too
                    raise
                raise self._explain(process, len(content)) from None

    def end(self, key: Hashable) -> None:
        """Ends a call of `decode`, if there is one with this key."""
        with self._lock:
            process = self._busy.get(key)
            if process is not None:
                process.kill()

    def close(self) -> None:
        """Ends all processes; calls of `decode` raise DecodingEndedError."""
        with self._lock:
            self._is_open = False
            idle, self._idle = self._idle, []
            for process in self._busy.values():
                process.kill()
        for process in idle:
            process.close()

    def _decode(self, process: _Process, content: bytes, admit: Admit | None) -> Image.Image:
        process.send({"num_bytes": len(content), **self._limits}, content)
        cost = process.receive()
        try:
            if admit is not None:
                admit(cost["peak_bytes"], cost["result_bytes"])
        except BaseException:
            process.was_ended = True  # it waits for a go-ahead that will not come
            raise
        process.send({})
        result = process.receive()
        width, height = result["size"]
        return process.receive_pixels((width, height), is_shared=result["is_shared"]).as_image()

    def _explain(self, process: _Process, num_bytes: int) -> Exception:
        """Returns the error for a process that ended while it decoded."""
        if process.was_ended:
            return DecodingEndedError()
        process.was_ended = True
        if process.was_late():
            seconds = self._limits["seconds"]
            return ImageTooLargeError(
                f"the image takes more than {seconds:g} s to decode; save it as a smaller or simpler file"
            )
        _log.warning("a decoder process ended while it decoded an image of %d bytes", num_bytes)
        return ImageDecodeError("the image cannot be decoded: the decoder failed on it; save it in another format")

    @contextlib.contextmanager
    def _borrow(self, key: Hashable) -> Iterator[_Process]:
        with self._lock:
            if not self._is_open:
                raise DecodingEndedError
            process = self._take()
            self._busy[key] = process
        try:
            yield process
        finally:
            with self._lock:
                del self._busy[key]
                is_kept = self._is_open and not process.was_ended
                if is_kept:
                    self._idle.append(process)
            if not is_kept:
                process.close()

    def _take(self) -> _Process:
        """Returns a process that runs. The caller holds the lock."""
        while self._idle:
            process = self._idle.pop()
            if process.is_running():
                return process
            process.close()  # the system may end it at any time, for want of memory
        return _Process()


def _make_environment() -> dict[str, str]:
    """Returns what Python needs to start; a child that a stranger's file has taken over must not find keys and tokens."""
    kept = {name: value for name, value in os.environ.items() if name.upper().startswith(_KEPT_VARIABLES)}
    return {**kept, **_ENVIRONMENT}


def _make_error(name: str, message: str) -> Exception:
    if name == INTERNAL:
        return RuntimeError(f"the decoder process failed:\n{message}")
    kind: type[Exception] = getattr(errors, name)
    return kind(message)
