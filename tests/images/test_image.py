"""Images from all sources to RGB, and RGB to the reference's `pixel_values`."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import threading
import time
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from florence_onnx.errors import (
    ImageDecodeError,
    ImageDownloadError,
    ImageError,
    ImageNotFoundError,
    ImageTooLargeError,
)
from florence_onnx.images.decoding import load
from florence_onnx.images.opening import MAX_PIXELS
from florence_onnx.images.preprocessing import IMAGE_MEAN, IMAGE_STD, preprocess

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")


def _pixels(width: int = 37, height: int = 23) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _image(mode: str = "RGB", width: int = 37, height: int = 23) -> Image.Image:
    image = Image.fromarray(_pixels(width, height))
    if mode in ("RGBa", "PA"):
        image = image.convert("RGBA" if mode == "RGBa" else "P")
    return image.convert(mode)


def _encode(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _assert_same(first: Image.Image, second: Image.Image) -> None:
    assert first.mode == second.mode == "RGB"
    assert np.array_equal(np.asarray(first), np.asarray(second))


# --- sources -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def png(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "an image ü.png"
    path.write_bytes(_encode(_image()))
    return path


SOURCES: dict[str, Callable[[Path], object]] = {
    "path": lambda path: path,
    "string": str,
    "bytes": Path.read_bytes,
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "buffer": lambda path: io.BytesIO(path.read_bytes()),
    "file": lambda path: path.open("rb"),
    "unread PIL": Image.open,
    "array": lambda path: np.asarray(Image.open(path)),
    "strided array": lambda path: np.asarray(Image.open(path))[:, ::-1][:, ::-1],
    "base64 URI": lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
    "URL-safe base64 URI": lambda path: (
        "DATA:;base64," + base64.urlsafe_b64encode(path.read_bytes()).decode().rstrip("=")
    ),
    "wrapped base64 URI": lambda path: "data:image/png;base64," + base64.encodebytes(path.read_bytes()).decode(),
    "percent-encoded URI": lambda path: "data:image/png," + urllib.parse.quote_from_bytes(path.read_bytes()),
    "percent-encoded base64 URI": lambda path: (
        "data:image/png;charset=x;base64," + urllib.parse.quote(base64.b64encode(path.read_bytes()), safe="")
    ),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_image(source: str, png: Path) -> None:
    given_image = SOURCES[source](png)
    _assert_same(load(given_image), _image())  # type: ignore[arg-type]
    if hasattr(given_image, "close"):
        given_image.close()


def test_a_stream_that_cannot_seek_is_read_from_its_current_position(png: Path) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as stream:
        stream.write(b"head" + png.read_bytes())
    with os.fdopen(reader, "rb") as stream:
        stream.read(4)
        _assert_same(load(stream), _image())


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "TGA", "ICO", "JPEG", "PCX"])
def test_formats_stay_usable_after_their_file_is_closed(image_format: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(_encode(_image(), image_format))
    with Image.open(path) as reference:
        expected = reference.convert("RGB")
    loaded = load(path, formats=[image_format])
    _assert_same(loaded, expected)
    _assert_same(loaded.resize((10, 10)), expected.resize((10, 10)))


def test_an_upright_rgb_image_is_returned_itself_unless_a_copy_is_wanted() -> None:
    image = _image()
    assert load(image) is image
    copied = load(image, copy=True)
    assert copied is not image
    _assert_same(copied, image)
    image.putpixel((0, 0), (1, 2, 3))
    assert copied.getpixel((0, 0)) != (1, 2, 3)


def test_the_callers_image_is_not_changed() -> None:
    image = _image("P")
    image.info["transparency"] = b"\x00\x80"
    load(image)
    assert image.mode == "P" and image.info["transparency"] == b"\x00\x80"


# --- modes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_modes_convert_as_pillow_does(mode: str) -> None:
    _assert_same(load(_image(mode)), _image(mode).convert("RGB"))


def test_premultiplied_grey_converts_in_two_steps() -> None:
    image = _image("LA").convert("La")
    _assert_same(load(image), image.convert("LA").convert("RGB"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("transparency", [3, b"\x00\x80\xff"])
def test_palette_transparency_is_dropped_without_a_warning(transparency: object) -> None:
    encoded = _encode(_image("P"), "PNG", transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = Image.open(io.BytesIO(encoded)).convert("RGB")
    _assert_same(load(encoded), expected)


def _grey(values: npt.NDArray[np.generic]) -> list[int]:
    red, green, blue = np.asarray(load(Image.fromarray(values))).transpose(2, 0, 1)
    assert np.array_equal(red, green) and np.array_equal(green, blue)
    return [int(value) for value in red.ravel()]


def test_sixteen_bits_are_divided_by_257() -> None:
    values = np.array([[0, 128, 129, 257, 25700, 65535]], dtype=np.uint16)
    assert _grey(values) == [0, 0, 1, 1, 100, 255]
    encoded = _encode(Image.fromarray(values))
    assert [int(value) for value in np.asarray(load(encoded))[0, :, 0]] == [0, 0, 1, 1, 100, 255]


def test_big_endian_sixteen_bits_are_the_same() -> None:
    image = Image.frombytes("I;16B", (2, 1), np.array([128, 25700], dtype=">u2").tobytes())
    assert [int(value) for value in np.asarray(load(image))[0, :, 0]] == [0, 100]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 7, 255], [0, 7, 255]),
        ([0, 257, 65535], [0, 1, 255]),
        ([-100, 0, 100], [0, 127, 255]),
        ([0, 50_000, 100_000], [0, 128, 255]),
        ([9, 9, 9], [9, 9, 9]),
    ],
)
def test_wide_integers_are_scaled_and_not_clipped(values: list[int], expected: list[int]) -> None:
    assert _grey(np.array([values], dtype=np.int32)) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.5, 1], [0, 128, 255]),
        ([0, 7, 255], [0, 7, 255]),
        ([-1, 0, 1], [0, 128, 255]),
        ([np.nan, 0.5, np.inf], [0, 128, 255]),
        ([np.nan, np.nan, np.nan], [0, 0, 0]),
    ],
)
def test_floats_are_scaled_and_not_clipped(values: list[float], expected: list[int]) -> None:
    assert _grey(np.array([values], dtype=np.float32)) == expected


# --- EXIF ----------------------------------------------------------------------------------------------------------


def _with_orientation(orientation: object, image_format: str = "JPEG", mode: str = "RGB") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return _encode(_image(mode), image_format, exif=exif.tobytes())


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied_once(orientation: int, image_format: str) -> None:
    encoded = _with_orientation(orientation, image_format)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB")
    upright = load(encoded)
    _assert_same(upright, expected)
    _assert_same(load(upright), expected)
    _assert_same(load(upright.copy()), expected)
    _assert_same(load(Image.open(io.BytesIO(encoded))), expected)


@pytest.mark.parametrize("orientation", [1, 6])
def test_exif_orientation_can_be_ignored_as_in_the_reference(orientation: int) -> None:
    encoded = _with_orientation(orientation)
    raw = Image.open(io.BytesIO(encoded)).convert("RGB")
    _assert_same(load(encoded, apply_exif=False), raw)
    _assert_same(load(Image.open(io.BytesIO(encoded)), apply_exif=False), raw)


def test_exif_orientation_of_a_grey_image_is_applied() -> None:
    assert load(_with_orientation(6, mode="L")).size == (23, 37)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_lose_the_image() -> None:
    encoded = _encode(_image(), "JPEG", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12")
    _assert_same(load(encoded), Image.open(io.BytesIO(encoded)).convert("RGB"))


def test_one_unread_image_may_be_loaded_in_many_threads() -> None:
    encoded = _with_orientation(6)
    expected = load(encoded)
    for _ in range(20):
        shared = Image.open(io.BytesIO(encoded))
        with ThreadPoolExecutor(8) as pool:
            for loaded in pool.map(load, [shared] * 8):
                _assert_same(loaded, expected)


# --- errors --------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ImageNotFoundError, match=r"no such image file: no/such\.png \(working directory "):
        load("no/such.png")
    with pytest.raises(FileNotFoundError):
        load(Path("no/such.png"))


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is a directory"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["a\x00b", "x" * 5000])
def test_impossible_names_are_refused(name: str) -> None:
    with pytest.raises(ImageError, match=r"cannot open|no such") as caught:
        load(name)
    assert len(str(caught.value)) < 500


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    path.touch()
    for source in (path, b"", io.BytesIO(), "data:image/png;base64,", "data:,"):
        with pytest.raises(ImageDecodeError, match=r"is empty \(0 bytes\)"):
            load(source)


@pytest.mark.parametrize("content", [b"hello", b"<svg></svg>", b"<!doctype html>", b"\x00" * 100])
def test_data_that_is_no_image_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_bytes(content)
    with pytest.raises(ImageDecodeError, match=r"text\.png is not an image that Pillow can read"):
        load(path)


def test_heic_is_refused_with_a_hint() -> None:
    with pytest.raises(ImageDecodeError, match="pillow-heif"):
        load(b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic")


def test_postscript_is_refused_because_it_would_run_a_program() -> None:
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(ImageDecodeError, match="Ghostscript"):
        load(script)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_images_are_refused(image_format: str, share: float) -> None:
    encoded = _encode(_image(width=200, height=150), image_format)
    with pytest.raises(ImageDecodeError, match="bytes of data is"):
        load(encoded[: int(len(encoded) * share)])


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_images_give_an_image_or_our_error(data: st.DataObject) -> None:
    image_format = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "ICO", "PPM", "JPEG2000"]))
    damaged = bytearray(_encode(_image(), image_format))
    for _ in range(data.draw(st.integers(1, 10))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ImageError):
            assert load(bytes(damaged), max_pixels=10**6).mode == "RGB"


def _png_header(width: int, height: int) -> bytes:
    """A tiny PNG that claims to be huge."""
    import struct
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(ImageTooLargeError, match="is too large"):
        load(_png_header(50_000, 50_000))


@pytest.mark.filterwarnings("error")
def test_a_large_image_is_refused_where_pillows_warning_is_an_error() -> None:
    assert MAX_PIXELS > 10_000 * 10_000
    with pytest.raises(ImageTooLargeError, match="is too large"):
        load(_png_header(10_000, 10_000))


@pytest.mark.filterwarnings("ignore")
def test_the_limit_of_pixels_can_be_set(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(_png_header(10_000, 10_000))
    with pytest.raises(
        ImageTooLargeError, match=r"10000 x 10000 = 100,000,000 pixels, allowed are 1,000,000; raise max_pixels"
    ):
        load(path, max_pixels=10**6)
    for source in (_image(), _pixels(), _encode(_image())):
        with pytest.raises(ImageTooLargeError, match="raise max_pixels"):
            load(source, max_pixels=850)
        assert load(source, max_pixels=851).size == (37, 23)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4), np.uint8), r"must be \(H, W, 3\) uint8 in RGB order, got shape \(4, 4\)"),
        (np.zeros((4, 4, 4), np.uint8), r"got shape \(4, 4, 4\)"),
        (np.zeros((3, 4, 4), np.uint8), r"got shape \(3, 4, 4\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"got shape \(1, 4, 4, 3\)"),
        (np.zeros((4, 4, 3), np.float32), r"got float32; scale it to 0\.\.255"),
        (np.zeros((0, 4, 3), np.uint8), "got an empty one"),
    ],
)
def test_arrays_of_another_kind_are_refused(array: npt.NDArray[np.uint8], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load(array)


@pytest.mark.parametrize("wrong", [None, 7, [1, 2], {"url": "x"}, object()])
def test_other_arguments_are_refused(wrong: object) -> None:
    with pytest.raises(ImageError, match="pass a path"):
        load(wrong)  # type: ignore[arg-type]


def test_streams_that_give_no_bytes_are_refused() -> None:
    with pytest.raises(ImageError, match="binary mode"):
        load(io.StringIO("text"))  # type: ignore[arg-type]
    closed = io.BytesIO(b"x")
    closed.close()
    with pytest.raises(ImageError, match="closed file"):
        load(closed)


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(ImageDecodeError, match="no pixels"):
        load(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("data:image/png;base64", "needs a comma"),
        ("data:image/png;base64,!!!!", "broken"),
        ("data:;base64,A", "broken"),
    ],
)
def test_broken_data_uris_are_refused(uri: str, message: str) -> None:
    with pytest.raises(ImageDecodeError, match=message):
        load(uri)


@pytest.mark.parametrize("head", ["data:image/png;base64,", "data:image/png,"])
def test_long_data_uris_are_refused(head: str) -> None:
    with pytest.raises(ImageTooLargeError, match="raise max_bytes"):
        load(head + "A" * 20_000, max_bytes=10_000)


# --- downloads -----------------------------------------------------------------------------------------------------


class _Images(BaseHTTPRequestHandler):
    """Responds by path; `/slow` sends a byte now and then."""

    def do_GET(self) -> None:
        encoded = _encode(_image())
        name = urllib.parse.unquote(self.path.split("?")[0]).strip("/")
        if name == "moved":
            self._answer(302, b"", Location="/image.png")
        elif name == "to-file":
            self._answer(302, b"", Location="file:///etc/passwd")
        elif name == "circle":
            self._answer(302, b"", Location="/circle")
        elif name == "page":
            self._answer(200, b"<html>Please log in</html>")
        elif name == "short":
            self._answer(200, encoded[:50], **{"Content-Length": str(len(encoded))})
        elif name == "half":
            self._answer(200, encoded[: len(encoded) // 2])
        elif name == "large":
            self._answer(200, b"", **{"Content-Length": str(10**12)})
        elif name == "endless":
            self._send_slowly(b"x" * 50_000, pause=0)
        elif name == "slow":
            self._send_slowly(b"x", pause=0.05)
        elif name == "silent":
            time.sleep(2)
        elif name.startswith("image"):
            self._answer(200, encoded)
        else:
            self._answer(404, b"no")

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def _send_slowly(self, piece: bytes, pause: float) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(200):
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(pause)
        except OSError:  # the client has hung up, as it should
            self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Images)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("path", ["/image.png", "/image ü.png?a=b c", "/moved", "/image#top"])
def test_urls_are_downloaded(path: str, address: str) -> None:
    _assert_same(load(address + path), _image())
    _assert_same(load((address + path).replace("http", "HTTP")), _image())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nothing?token=secret", "the server answered 404"),
        ("/page", r"gave no image: .* is not an image .*begins with '<html>Please log in"),
        ("/half", "gave no image: .* is truncated or damaged"),
        ("/short", "the connection closed after 50 of"),
        ("/to-file", "cannot download"),
        ("/circle", "cannot download"),
    ],
)
def test_urls_without_an_image_are_refused(path: str, message: str, address: str) -> None:
    with pytest.raises(ImageDownloadError, match=message) as caught:
        load(address + path)
    assert isinstance(caught.value, OSError)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("path", ["/large", "/endless"])
def test_long_downloads_are_stopped(path: str, address: str) -> None:
    with pytest.raises(ImageTooLargeError, match="allowed are 100,000; raise max_bytes"):
        load(address + path, max_bytes=100_000)


@pytest.mark.parametrize("path", ["/slow", "/silent"])
def test_slow_downloads_are_given_up(path: str, address: str) -> None:
    start = time.monotonic()
    with pytest.raises(ImageDownloadError, match=r"within 0\.3 s; raise timeout"):
        load(address + path, timeout=0.3)
    assert time.monotonic() - start < 1.5


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/x.png", "http://", "https://[::1", "http://127.0.0.1:port/", "http://a..b/"]
)
def test_unreachable_addresses_are_refused(url: str) -> None:
    with pytest.raises(ImageDownloadError, match="cannot download"):
        load(url, timeout=2)


# --- pixel_values --------------------------------------------------------------------------------------------------


def _reference(image: Image.Image, size: tuple[int, int] = (768, 768)) -> npt.NDArray[np.float32]:
    """The reference's steps, each in the precision in which the reference computes it."""
    levels = np.asarray(image.resize(size, Image.Resampling.BICUBIC)).astype(np.float64)
    unit = (levels * (1 / 255)).astype(np.float32)
    normalized = (unit - np.float32(IMAGE_MEAN)) / np.float32(IMAGE_STD)
    return normalized.transpose(2, 0, 1)[np.newaxis]


def test_every_level_is_bitwise_that_of_the_reference() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([levels] * 3, axis=-1))
    pixel_values = preprocess(image, size=(16, 16))
    assert np.array_equal(pixel_values, _reference(image, (16, 16)))
    assert pixel_values.min() == pytest.approx(-2.1179039) and pixel_values.max() == pytest.approx(2.6400001)


@pytest.mark.parametrize("size", [(768, 768), (1, 1), (640, 480), (37, 1111), (1500, 700)])
def test_pixel_values_equal_the_reference(size: tuple[int, int]) -> None:
    image = _image(width=size[0], height=size[1])
    pixel_values = preprocess(image)
    assert pixel_values.shape == (1, 3, 768, 768)
    assert pixel_values.dtype == np.float32 and pixel_values.flags.c_contiguous
    assert np.array_equal(pixel_values, _reference(image))


def test_pixel_values_equal_the_reference_on_photographs(photographs: list[Image.Image]) -> None:
    for photograph in photographs:
        assert np.array_equal(preprocess(photograph), _reference(photograph))
        assert np.array_equal(preprocess(np.asarray(photograph)), _reference(photograph))


@pytest.fixture(scope="module")
def clip_processor() -> Callable[..., npt.NDArray[np.float32]]:
    transformers = pytest.importorskip("transformers", reason="compares pixels with transformers' CLIPImageProcessor")
    processor = transformers.CLIPImageProcessor(
        size={"height": 768, "width": 768},
        resample=3,
        do_center_crop=False,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
        do_convert_rgb=None,
    )

    def process(image: Image.Image, size: tuple[int, int]) -> npt.NDArray[np.float32]:
        width, height = size
        values = processor(image, size={"height": height, "width": width}, return_tensors="np")["pixel_values"]
        return np.asarray(values)

    return process


@pytest.mark.parametrize("size", [(768, 768), (224, 224), (128, 96), (1600, 1600)])
def test_photographs_equal_transformers_bitwise(
    size: tuple[int, int], clip_processor: Callable[..., npt.NDArray[np.float32]], photographs: list[Image.Image]
) -> None:
    for photograph in photographs:
        assert np.array_equal(preprocess(photograph, size=size), clip_processor(photograph, size))


@pytest.mark.parametrize("mode", [*MODES, "I;16"])
def test_all_modes_equal_transformers_after_conversion(
    mode: str, clip_processor: Callable[..., npt.NDArray[np.float32]]
) -> None:
    image = _image("L").convert("I").convert(mode) if mode == "I;16" else _image(mode, width=411, height=300)
    # Pillow would clip 16 bits to 8: for this mode the reference is given the image that `load` returns
    converted = load(image) if mode == "I;16" else image.convert("RGB")
    expected = clip_processor(converted, (768, 768))
    assert np.array_equal(preprocess(load(image)), expected)
    assert np.array_equal(preprocess(image), expected)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64), st.integers(1, 64))
@settings(max_examples=40, deadline=None)
def test_any_size_to_any_size(width: int, height: int, new_width: int, new_height: int) -> None:
    image = _image(width=width, height=height)
    size = (new_width, new_height)
    assert np.array_equal(preprocess(image, size=size), _reference(image, size))


def test_other_means_and_deviations() -> None:
    image = _image()
    values = preprocess(image, size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.125))
    levels = np.asarray(image.resize((8, 8), 3)).astype(np.float64)
    expected = ((levels / 255).astype(np.float32) - np.float32(0.5)) / np.float32([0.5, 0.25, 0.125])
    assert np.array_equal(values[0], expected.transpose(2, 0, 1))


def test_a_batch_is_written_in_place() -> None:
    batch = np.full((2, 3, 96, 128), np.nan, dtype=np.float32)
    for row, image in zip(batch, (_image(), _image("L")), strict=True):
        values = preprocess(image, size=(128, 96), out=row)
        assert np.shares_memory(values, batch)
    assert np.array_equal(batch[:1], preprocess(_image(), size=(128, 96)))
    assert np.isfinite(batch).all()


@pytest.mark.parametrize(
    "out",
    [np.empty((3, 96, 128), np.float64), np.empty((1, 3, 96, 128), np.float32), np.empty((96, 128, 3), np.float32).T],
)
def test_a_wrong_out_is_refused(out: npt.NDArray[np.float32]) -> None:
    with pytest.raises(ImageError, match="C-contiguous float32"):
        preprocess(_image(), size=(128, 96), out=out)


def test_preprocess_does_not_load_files() -> None:
    with pytest.raises(ImageError, match="use load first"):
        preprocess("image.png")  # type: ignore[arg-type]
