"""What hostile images cost: `python -m benchmarks.serving.image_costs`, and `--server` for those that take a server down.

Prints a table of seconds, memory above that of an idle process, and outcome. To measure another version, copy this file
and `tests/hostile_images.py` into a checkout of it. Linux only.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from benchmarks.serving.servers import Server, serve
from florence_onnx.fal.contract import APP
from tests import hostile_images as hostile

MAX_PIXELS = 50_000_000
"""As in the server."""
SIDE = 7071
_TIMEOUT = 120.0


def _gradient(mode: str, image_format: str, **options: object) -> bytes:
    image = Image.linear_gradient("L").resize((SIDE, SIDE))
    return hostile.saved(image.convert(mode), image_format, **options)


CASES: dict[str, Callable[[], bytes]] = {
    "IPTC around an EPS": lambda: hostile.iptc(hostile.EPS),
    "IPTC around a PNG of 81 megapixels": lambda: hostile.iptc(hostile.png(9000, 9000)),
    "BLP1 around a JPEG of 144 megapixels": lambda: hostile.blp1(
        hostile.saved(Image.new("L", (12000, 12000), 90), "JPEG")
    ),
    "ICNS around a PNG of 169 megapixels": lambda: hostile.icns(hostile.png(13000, 13000)),
    "progressive JPEG of 150 scans": lambda: hostile.many_scans(7000, 150),
    "progressive JPEG of 32 scans": lambda: hostile.many_scans(7000, 32),
    "EPS of 5 MB of comments": lambda: hostile.EPS[:60] + b"%x\n" * 1_600_000,
    "PNG, 16-bit grey": lambda: hostile.png(SIDE, SIDE, depth=16),
    "TIFF, 32-bit float": lambda: _gradient("F", "TIFF", compression="tiff_adobe_deflate"),
    "PNG of 50,000,000 x 1": lambda: hostile.png(50_000_000, 1),
    "PNG with 3 MB of compressed text": lambda: hostile.with_chunks(
        hostile.png(64, 48), hostile.compressed_text(3_000_000)
    ),
    "PNG with a profile of 3 MB": lambda: hostile.with_chunks(hostile.png(64, 48), hostile.colour_profile(3_000_000)),
    "PNG, interlaced": lambda: hostile.png(SIDE, SIDE, interlaced=True),
    "PNG of 800,000 empty chunks": lambda: hostile.with_chunks(
        hostile.png(8, 8), hostile.chunk(b"IDAT", b"") * 800_000
    ),
    "JPEG of 1,000,000 segments": lambda: hostile.many_segments(1_000_000),
    "JPEG whose EXIF tags share 32 kB": hostile.jpeg_with_shared_tags,
    "TIFF whose 1000 tags share 1 MB": lambda: hostile.shared_tags(1000, 1_000_000),
    "TIFF, tile of 30,000 x 30,000 in 10 x 10": lambda: hostile.huge_tile(30_000),
    "TIFF of 1,000,000 tiles": lambda: hostile.many_tiles(1_000_000),
    "BMP, run lengths": lambda: hostile.run_lengths(7000, 7000),
    "GIF with 10 MB of comments": lambda: hostile.gif_with_comments(10_000_000),
    "GIF of 2000 frames": lambda: hostile.frames("GIF", 2000),
    "WebP of 2000 frames": lambda: hostile.frames("WEBP", 2000),
    "MPO of 1000 images": lambda: hostile.frames("MPO", 1000),
    "WebP, 50 megapixels": lambda: _gradient("RGB", "WEBP", quality=30, method=0),
    "AVIF, 50 megapixels": lambda: _gradient("RGB", "AVIF", speed=10, quality=20),
    "JPEG, progressive, 50 megapixels": lambda: _gradient("RGB", "JPEG", progressive=True),
    "JPEG, CMYK, 50 megapixels": lambda: _gradient("CMYK", "JPEG"),
    "PNG, RGBA, 50 megapixels": lambda: hostile.png(SIDE, SIDE, colour=6),
}

_MEASURE = """
import json, sys, time
from pathlib import Path
from florence_onnx.images import decoding, preprocessing
def most():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
content = Path(sys.argv[1]).read_bytes()
before, begin = most(), time.process_time()
try:
    image = decoding.load(content, max_pixels=int(sys.argv[2]))
    preprocessing.preprocess(image)
    outcome = f"decoded, {image.width} x {image.height}"
except Exception as error:
    outcome = f"{type(error).__name__}"
print(json.dumps([time.process_time() - begin, most() - before, outcome]))
"""


def measure(content: bytes) -> tuple[float, float, str]:
    """Loads and preprocesses an image in a fresh process.

    Returns:
        Seconds of the processor, MB of memory at the peak, and the outcome.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        command = [sys.executable, "-c", _MEASURE, file.name, str(MAX_PIXELS)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=True)
        except subprocess.TimeoutExpired:
            return _TIMEOUT, float("nan"), "not ended"
        except subprocess.CalledProcessError as error:
            return float("nan"), float("nan"), f"died, exit code {error.returncode}"
    seconds, megabytes, outcome = json.loads(done.stdout)
    return seconds, megabytes, outcome


def print_images() -> None:
    """Prints the table of all `CASES`."""
    print("| image | bytes | CPU s | MB | outcome |\n|---|---|---|---|---|")
    for name, make in CASES.items():
        content = make()
        seconds, megabytes, outcome = measure(content)
        print(f"| {name} | {len(content):,} | {seconds:.2f} | {megabytes:,.0f} | {outcome} |", flush=True)


# -------------------------------------------------------------------------------------------------------------- servers


def ask(server: Server, content: bytes, *, timeout: float = 600.0) -> int:
    """Sends an image for a caption; returns the status, 0 if the caller hung up first."""
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    body = json.dumps({"image_url": uri}).encode()
    url = f"http://{server.host}:{server.port}/{APP}/caption"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@contextlib.contextmanager
def watched(server: Server) -> Iterator[list[float]]:
    """Yields a list of the MB that the server and its children have, measured twenty times a second."""
    found, has_ended = [0.0], threading.Event()

    def watch() -> None:
        while not has_ended.wait(0.05):
            found.append(server.family_memory_bytes() / 2**20)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        has_ended.set()
        thread.join()


def print_server(model: str) -> None:
    """Prints the table of attacks on a server."""
    small = hostile.png(64, 48)
    large = [
        hostile.with_chunks(hostile.png(SIDE, SIDE), hostile.chunk(b"tEXt", b"number\0%d" % index))
        for index in range(32)
    ]
    scans = hostile.many_scans(7000, 150)
    print("| attack | MB | statuses | seconds of another client's caption |\n|---|---|---|---|")
    with serve(model, "--images", "none") as server:
        ask(server, small)
        with watched(server) as megabytes, ThreadPoolExecutor(33) as pool:
            answers = [pool.submit(ask, server, content) for content in large]
            statuses = sorted({str(answer.result()) for answer in answers})
        print(f"| 50 megapixels from 32 clients | {max(megabytes):,.0f} | {', '.join(statuses)} | |", flush=True)
    with serve(model, "--images", "none") as server:
        ask(server, small)
        with watched(server) as megabytes, ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: ask(server, scans, timeout=0.3), range(4)))
            begin = time.monotonic()
            status = ask(server, hostile.png(64, 49))
            seconds = time.monotonic() - begin
        print(f"| 4 x 150 scans, hung up | {max(megabytes):,.0f} | {status} | {seconds:.1f} |", flush=True)


def print_small() -> None:
    """Prints what a process of its own costs a small image."""
    from florence_onnx.images.decoder_processes import DecoderProcesses
    from florence_onnx.images.decoding import load

    processes = DecoderProcesses(1)
    image = Image.linear_gradient("L").resize((640, 480)).convert("RGB")
    print("| small image | in threads, ms (median, least) | in processes, ms (median, least) |\n|---|---|---|")
    for name, content in {
        "PNG, 64 x 48": hostile.png(64, 48),
        "JPEG, 640 x 480": hostile.saved(image, "JPEG"),
    }.items():
        here: list[float] = []
        there: list[float] = []
        for _ in range(300):
            for times, decode in ((here, load), (there, processes.decode)):
                begin = time.perf_counter()
                decode(content)
                times.append((time.perf_counter() - begin) * 1000)
        print(
            f"| {name} | {statistics.median(here):.2f}, {min(here):.2f} "
            f"| {statistics.median(there):.2f}, {min(there):.2f} |"
        )
    processes.close()


def main() -> None:
    """Parses the arguments and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", action="store_true", help="attack a server")
    parser.add_argument("--small", action="store_true", help="measure what a process costs a small image")
    parser.add_argument("--model", default="demo", help="a bundle")
    arguments = parser.parse_args()
    if arguments.server:
        print_server(arguments.model)
    elif arguments.small:
        print_small()
    else:
        print_images()


if __name__ == "__main__":
    main()
