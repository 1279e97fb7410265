"""A process that decodes images for another one, which may end it at any time; `decoder_processes` starts it.

Both sides send a line of JSON, and then bytes where the line announces some:

```text
parent: {"num_bytes", "max_pixels", "max_side", "seconds"}, the encoded image
child:  {"peak_bytes", "result_bytes"}                       what it will take; waits for the parent's go-ahead
parent: {}
child:  {"size": [width, height], "is_shared"}, 4 * width * height bytes, row by row: RGB and a byte without meaning
```

The bytes of small images are not sent: they lie in a file in memory that both sides share.

Instead of any of its lines the child may send `{"error", "message"}`, the name of an error of `florence_onnx.errors`.
"""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import os
import signal
import sys
import traceback
import warnings
from typing import Any, BinaryIO

from florence_onnx.errors import ImageError, ImageTooLargeError
from florence_onnx.images.opening import DecodeLimits, open_image
from florence_onnx.images.pixels import PixelBlock

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

SHARED_BYTES = 2**22
"""Size of the shared file: an image of a megapixel. Through a pipe it would take as long as decoding it."""
BLOCK_BYTES = 2**20
"""Pixels are sent in blocks of this many bytes, each of which is given back to the system once it was sent."""
OPEN_BYTES = 256 * 2**20
"""Address space, beyond the encoded image, for reading a header."""
_CANVAS_BYTES = 8
"""Address space for each pixel that Pillow takes when it opens a WebP, though it does not write to it yet."""
SLACK_BYTES = 64 * 2**20
"""Address space, beyond the estimate, for decoding: threads' stacks, buffers and fragments."""
NAME = "the image"
INTERNAL = "internal"
"""Stands for an error that is none of ours."""


def main(shared_file: int | None) -> None:
    """Decodes images from standard input until it ends.

    Args:
        shared_file: Descriptor of the file of `SHARED_BYTES` for small images; None where there is none.
    """
    shared = None if shared_file is None else mmap.mmap(shared_file, SHARED_BYTES)
    warnings.simplefilter("ignore")  # of what strangers send; they would fill the parent's log
    with contextlib.suppress(ImportError):  # a Pillow before 11.3
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # one image must not take all cores
    receiver, sender = sys.stdin.buffer, sys.stdout.buffer
    while line := receiver.readline():
        request = json.loads(line)
        content = receiver.read(request["num_bytes"])
        _set_alarm(request["seconds"])
        try:
            _answer(request, content, receiver, sender, shared)
        except MemoryError:
            message = f"{NAME} takes more memory to decode than images of its size do; save it in another format"
            _send(sender, {"error": ImageTooLargeError.__name__, "message": message})
        except ImageError as error:
            _send(sender, {"error": type(error).__name__, "message": str(error)})
        except Exception:  # noqa: BLE001 - the parent logs it, and this process goes on
            _send(sender, {"error": INTERNAL, "message": traceback.format_exc()})
        _set_alarm(0)
        _limit_memory(None)


def _answer(
    request: dict[str, Any], content: bytes, receiver: BinaryIO, sender: BinaryIO, shared: mmap.mmap | None = None
) -> None:
    limits = DecodeLimits(request["max_pixels"], request["max_side"])
    _limit_memory(OPEN_BYTES + len(content) + _CANVAS_BYTES * request["max_pixels"])
    opened = open_image(io.BytesIO(content), NAME, limits)
    _send(sender, {"peak_bytes": opened.peak_bytes, "result_bytes": opened.result_bytes})
    _set_alarm(0)  # the parent may have to wait for memory
    receiver.readline()
    _set_alarm(request["seconds"])
    _limit_memory(opened.peak_bytes + SLACK_BYTES)
    block = opened.decode()
    num_bytes = block.num_bytes
    if shared is not None and num_bytes <= SHARED_BYTES:
        shared[:num_bytes] = memoryview(block.memory)[:num_bytes]
        _send(sender, {"size": block.size, "is_shared": True})
    else:
        _send(sender, {"size": block.size, "is_shared": False})
        _send_pixels(block, sender)


def _send(sender: BinaryIO, message: dict[str, Any]) -> None:
    sender.write(json.dumps(message).encode() + b"\n")
    sender.flush()


def _send_pixels(block: PixelBlock, sender: BinaryIO) -> None:
    """Sends the pixels, and gives back their memory: the parent has them now."""
    memory, pages = memoryview(block.memory), block.memory if hasattr(block.memory, "madvise") else None
    for start in range(0, len(memory), BLOCK_BYTES):
        sender.write(memory[start : start + BLOCK_BYTES])
        if isinstance(pages, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED, start, min(BLOCK_BYTES, len(memory) - start))
    sender.flush()


def _set_alarm(seconds: float) -> None:
    """Ends this process after some seconds, even if the parent is gone; 0 is never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _limit_memory(more_bytes: int | None) -> None:
    """Limits the address space to what is used now and some more, where the system can; None is without a limit."""
    if _STATM is None or resource is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(os.pread(_STATM, 32, 0).split()[0]) * mmap.PAGESIZE
    soft = hard if more_bytes is None else used + more_bytes
    with contextlib.suppress(ValueError):  # the system has a lower limit
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _open_statm() -> int | None:
    try:
        return os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:  # not Linux
        return None


_STATM = _open_statm()
