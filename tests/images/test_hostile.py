"""Files that would cost more than the image that they show: refused before they are decoded, or decoded for less."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFile

from florence_onnx.errors import ImageDecodeError, ImageError, ImageTooLargeError, InputError
from florence_onnx.images import gif_blocks, jpeg_scans, opening, png_chunks
from florence_onnx.images.decoding import load
from florence_onnx.images.opening import FORMATS, DecodeLimits, open_image
from florence_onnx.images.rgb import to_rgb
from tests import hostile_images as hostile


def pixels_of(image: Image.Image) -> npt.NDArray[np.uint8]:
    return np.asarray(image.convert("RGB"))


# -------------------------------------------------------------------------------------------------------------- formats

NESTED: dict[str, Callable[[bytes], bytes]] = {
    "IPTC": hostile.iptc,
    "BLP": lambda inner: hostile.blp1(hostile.saved(Image.open(io.BytesIO(inner)), "JPEG")),
    "ICNS": hostile.icns,
    "ICO": hostile.ico,
}


@pytest.mark.parametrize("outer", NESTED)
def test_no_file_around_another_one_is_opened(outer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    really = Image.open

    def spy(stream: object, mode: str = "r", formats: tuple[str, ...] = ()) -> Image.Image:
        asked.append(tuple(formats))
        return really(stream, mode, formats)  # type: ignore[arg-type]

    wrapped = NESTED[outer](hostile.png(30, 20))
    monkeypatch.setattr(Image, "open", spy)
    with pytest.raises(ImageDecodeError):
        load(wrapped)
    assert asked == [()]  # no plugin saw it


@pytest.mark.parametrize("wrapped", [hostile.EPS, hostile.iptc(hostile.EPS)])
@pytest.mark.parametrize("formats", [FORMATS, ("PSD", "ICO", "BLP")])
def test_no_program_is_started(wrapped: bytes, formats: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)  # any start fails with another error
    with pytest.raises(ImageDecodeError, match="would run Ghostscript"):
        load(wrapped, formats=formats)


@pytest.mark.parametrize("name", ["EPS", "iptc"])
def test_formats_that_run_programs_cannot_be_allowed(name: str) -> None:
    with pytest.raises(InputError, match=f"{name.upper()} cannot be allowed: .* convert such files to PNG"):
        load(hostile.png(4, 4), formats=[*FORMATS, name])


def test_formats_that_do_not_exist_are_refused() -> None:
    with pytest.raises(InputError, match=r"Pillow knows no format 'PGN'; it knows .*PNG"):
        load(hostile.png(4, 4), formats=["PGN"])
    with pytest.raises(InputError, match="must be a list"):
        load(hostile.png(4, 4), formats="PNG")


def test_the_caller_may_allow_a_format_and_strangers_may_not() -> None:
    icon = hostile.saved(Image.new("RGB", (16, 16), (9, 8, 7)), "ICO")
    with pytest.raises(ImageDecodeError, match=r"of format ICO, .* pass formats=\['ICO'\] if you trust the file"):
        load(icon)
    assert load(icon, formats=[*FORMATS, "ico"]).getpixel((0, 0)) == (9, 8, 7)
    assert load(hostile.png(5, 4), formats=["PNG"]).size == (5, 4)
    with pytest.raises(ImageDecodeError):
        load(hostile.saved(Image.new("RGB", (4, 4)), "GIF"), formats=["PNG"])
    with pytest.raises(InputError, match="not for untrusted callers"):
        load("data:image/x-icon;base64,AAAA", formats=["ICO"], public_only=True)


def test_only_the_plugin_of_the_format_sees_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that begins as a PNG and is none is not tried as anything else."""
    for name in [name for name in Image.OPEN if name != "PNG"]:
        monkeypatch.setitem(Image.OPEN, name, (pytest.fail, None))
    with pytest.raises(ImageDecodeError):
        load(hostile.PNG_HEAD + b"rubbish of any kind, twenty bytes and more")


# --------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("size", [(70_000, 1), (1, 70_000)])
def test_sides_have_a_limit(size: tuple[int, int]) -> None:
    with pytest.raises(ImageTooLargeError, match="65,535 a side; raise max_side"):
        load(hostile.png(*size))
    assert load(hostile.png(*size), max_side=70_000).size == size
    with pytest.raises(ImageTooLargeError, match="max_side"):
        load(Image.new("L", size))


class Growing(ImageFile.ImageFile):
    """A plugin whose files turn out to be larger than their header says."""

    format = "GROWING"

    def _open(self) -> None:
        self._size, self._mode = (16, 16), "L"

    def load(self) -> None:
        self.im = Image.new("L", (300, 200)).im


@pytest.mark.parametrize("limit", [{"max_pixels": 400}, {"max_side": 20}])
def test_limits_hold_after_decoding_too(limit: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Image.OPEN, "GROWING", (Growing, lambda head: head.startswith(b"grow")))
    opened = open_image(io.BytesIO(b"grows"), "it", DecodeLimits(**limit, formats=["GROWING"]))
    assert opened.size == (16, 16)
    with pytest.raises(ImageTooLargeError, match="it has 300 x 200"):
        opened.decode()


@pytest.mark.filterwarnings("ignore:Image was not the expected size")
def test_limits_hold_for_what_an_icon_holds() -> None:
    with pytest.raises(ImageTooLargeError, match="300 x 200"):
        load(hostile.ico(hostile.png(300, 200)), formats=["ICO"], max_pixels=400)


# ------------------------------------------------------------------------------------------------------------------ PNG


def dotted() -> bytes:
    """A small PNG whose pixels differ."""
    return hostile.saved(Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)), "PNG")


EXTRA = {
    "text": hostile.compressed_text(3_000_000),
    "texts": hostile.compressed_text(900_000) * 100,
    "profile": hostile.colour_profile(3_000_000),
    "private": hostile.chunk(b"prVt", bytes(2_000_000)),
    "damaged profile": hostile.chunk(b"iCCP", b"not a profile"),
    "animation": hostile.chunk(b"acTL", struct.pack(">II", 10**6, 0)),
}


@pytest.mark.parametrize("extra", EXTRA)
def test_what_a_png_says_besides_its_pixels_does_not_matter(extra: str) -> None:
    good = dotted()
    assert np.array_equal(pixels_of(load(hostile.with_chunks(good, EXTRA[extra]))), pixels_of(load(good)))
    behind = good.replace(hostile.chunk(b"IEND", b""), EXTRA[extra] + hostile.chunk(b"IEND", b""))
    assert np.array_equal(pixels_of(load(behind)), pixels_of(load(good)))


@pytest.mark.parametrize("extra", ["text", "private"])
def test_chunks_that_are_taken_out_are_checked(extra: str) -> None:
    damaged = bytearray(hostile.with_chunks(dotted(), EXTRA[extra]))
    damaged[damaged.index(EXTRA[extra][4:8]) + 40] ^= 1
    with pytest.raises(ImageDecodeError, match="the checksum of a chunk is wrong"):
        load(bytes(damaged))
    with pytest.raises(ImageDecodeError, match="truncated"):
        load(bytes(damaged[: 60 + len(EXTRA[extra]) // 2]))


def test_damaged_pixels_are_still_found() -> None:
    damaged = bytearray(hostile.with_chunks(dotted(), EXTRA["text"]))
    damaged[damaged.index(b"IDAT") + 8] ^= 1
    with pytest.raises(ImageDecodeError):
        load(bytes(damaged))


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize(
    ("chunk", "is_turned"),
    [
        (hostile.chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP), True),
        (hostile.chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)), True),
        (hostile.chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP + bytes(3_000_000))), False),
        (hostile.chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP + bytes(100_000)), False),
    ],
)
def test_the_orientation_of_a_png_survives_if_it_is_short(chunk: bytes, is_turned: bool) -> None:
    assert load(hostile.with_chunks(hostile.png(5, 4), chunk)).size == ((4, 5) if is_turned else (5, 4))


def test_chunks_of_a_png_are_counted() -> None:
    empty = hostile.chunk(b"IDAT", b"")
    assert load(hostile.with_chunks(dotted(), empty * 1000)).size == (4, 4)
    with pytest.raises(ImageDecodeError, match="more than 65,536 chunks"):
        load(hostile.with_chunks(dotted(), empty * png_chunks.MAX_CHUNKS))


# ----------------------------------------------------------------------------------------------------------------- JPEG


@pytest.mark.parametrize("num_scans", [20, jpeg_scans.MAX_SCANS])
def test_jpegs_of_some_scans_are_decoded(num_scans: int) -> None:
    content = hostile.many_scans(64, num_scans)
    assert jpeg_scans.read_scans(content, "it").num_scans == num_scans
    assert np.array_equal(pixels_of(load(content)), pixels_of(Image.open(io.BytesIO(content))))


def test_jpegs_of_many_scans_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    content = hostile.many_scans(64, jpeg_scans.MAX_SCANS + 1)
    monkeypatch.setattr(opening, "_open", pytest.fail)
    with pytest.raises(ImageTooLargeError, match=r"more than 32 scans, .* baseline JPEG"):
        load(content)


@pytest.mark.parametrize(
    ("options", "blocks"),
    [({"subsampling": 0}, 3 * 8 * 8), ({"subsampling": 2}, 6 * 4 * 4), ({"progressive": False}, 0)],
)
def test_the_coefficients_of_a_progressive_jpeg_are_counted(options: dict[str, int], blocks: int) -> None:
    content = hostile.saved(Image.new("RGB", (64, 60)), "JPEG", **{"progressive": True, **options})
    opened = open_image(io.BytesIO(content), "it", DecodeLimits())
    assert opened.peak_bytes == 6 * 64 * 60 + blocks * 128


def test_segments_of_a_jpeg_are_counted() -> None:
    assert load(hostile.many_segments(1000)).size == (32, 32)
    with pytest.raises(ImageDecodeError, match="4,096 segments"):
        load(hostile.many_segments(5000))


def test_exif_data_that_is_read_many_times_is_refused() -> None:
    with pytest.raises(ImageDecodeError, match="its tags share their values"):
        load(hostile.jpeg_with_shared_tags())
    chunk = hostile.chunk(b"eXIf", hostile.shared_tags(2500, 32_000))
    assert load(hostile.with_chunks(hostile.png(5, 4), chunk)).size == (5, 4)  # as with any damaged EXIF data


# --------------------------------------------------------------------------------------------------- TIFF, GIF and BMP


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (hostile.huge_tile(3000), "tiles of 3000 x 3000 pixels in an image of 10 x 10"),
        (hostile.many_tiles(200_000), "200,000 strips or tiles"),
    ],
)
def test_tiles_larger_or_more_than_the_image_needs_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(ImageTooLargeError, match=message):
        load(content)
    assert load(hostile.many_tiles(20)).size == (20, 1)


@pytest.mark.parametrize("count", [10, 4000])
def test_tags_of_a_tiff_that_share_their_values_are_refused(count: int) -> None:
    with pytest.raises(ImageDecodeError, match="points to more than the file has"):
        load(hostile.shared_tags(count, 1_000_000))


def test_a_tag_twice_is_refused() -> None:
    tags = [struct.pack("<HHI", number, 4, 1) for number in (256, 257)]
    with pytest.raises(ImageDecodeError, match="a tag twice"):
        load(hostile.many_tiles(2).replace(tags[1], tags[0]))


@pytest.mark.parametrize("form", ["TIFF", "II+"])
def test_ordinary_tiffs_are_unchanged(form: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8))
    options = {"big_tiff": True} if form == "II+" else {"compression": "tiff_lzw"}
    assert np.array_equal(pixels_of(load(hostile.saved(image, "TIFF", **options))), pixels_of(image))


def test_comments_of_a_gif_are_skipped() -> None:
    assert load(hostile.gif_with_comments(2_000_000)).size == (32, 24)
    with pytest.raises(ImageDecodeError, match="65,536 blocks before its first frame"):
        load(hostile.gif_with_comments(gif_blocks.MAX_BLOCKS, 1))


def test_run_lengths_have_a_limit() -> None:
    assert load(hostile.run_lengths(60, 50)).size == (60, 50)
    with pytest.raises(ImageTooLargeError, match="run-length encoded BMP of 4,000,000 pixels"):
        load(hostile.run_lengths(2000, 2000))


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF"])
def test_of_many_frames_the_first_one_is_decoded(image_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import features

    if image_format == "AVIF" and not features.check("avif"):
        pytest.skip("needs a Pillow with AVIF")
    num_frames = 2 if image_format == "MPO" else 40  # old versions of Pillow write no more than two as MPO
    content = hostile.frames(image_format, num_frames, 32)
    shown = Image.open(io.BytesIO(content))
    assert shown.n_frames > num_frames // 2  # type: ignore[attr-defined]
    first = pixels_of(shown)
    plugin = type(shown)
    really = plugin.seek
    monkeypatch.setattr(plugin, "seek", lambda image, frame: pytest.fail() if frame else really(image, frame))
    assert np.array_equal(pixels_of(load(content)), first)


# ------------------------------------------------------------------------------------------------------------ wide grey


def scaled_at_once(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """The scale of `decoding.load`, on the whole image in float64."""
    wide = values.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if values.dtype.kind == "u":
        low, high = 0.0, 65535.0
    elif low >= 0 and high <= 65535:
        low, high = 0.0, 1.0 if high <= 1 and values.dtype == np.float32 else 255.0 if high <= 255 else 65535.0
    scaled = (np.nan_to_num(wide, nan=low, posinf=high, neginf=low) - low) * (255.0 / ((high - low) or 1.0))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def wide_values() -> dict[str, npt.NDArray[np.generic]]:
    rng = np.random.default_rng(7)
    shape = (700, 301)  # several strips
    floats = rng.normal(size=shape).astype(np.float32)
    odd = floats.copy()
    odd[::7, ::5], odd[3], odd[:, 2], odd[400:] = np.nan, np.inf, -np.inf, np.nan
    return {
        "16 bits": rng.integers(0, 2**16, shape, dtype=np.uint16),
        "32 bits": rng.integers(-(2**31), 2**31, shape, dtype=np.int32),
        "small": rng.integers(0, 256, shape, dtype=np.int32),
        "floats": floats,
        "unit": np.abs(floats) / np.float32(10),
        "nan": np.full(shape, np.nan, np.float32),
        "odd": odd,
        "large": floats * np.float32(1e38),
    }


@pytest.mark.parametrize("kind", wide_values())
def test_wide_grey_in_strips_is_bitwise_that_of_the_whole(kind: str) -> None:
    values = wide_values()[kind]
    image = Image.fromarray(values)
    expected = scaled_at_once(values)
    assert np.array_equal(np.asarray(to_rgb(image))[..., 1], expected)
    assert np.array_equal(np.asarray(load(hostile.saved(image, "TIFF")))[..., 2], expected)


# --------------------------------------------------------------------------------------------------------------- memory

SIDE = 2000
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "TIFF": ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("L", "P"),
}
MEASURE = """
import json, sys
from pathlib import Path
from florence_onnx.images.decoding import load
def most():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
for path in sys.argv[1:]:
    content = Path(path).read_bytes()
    load(Path(path).with_suffix(".small").read_bytes())  # what a plugin imports is not the image's
    Path("/proc/self/clear_refs").write_text("5")
    before = most()
    image = load(content)
    print(json.dumps([Path(path).name, (most() - before) / (image.width * image.height)]))
    del image
"""


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode == "PA":
        image = image.convert("P")
    return image.convert("L").convert("I").convert(mode) if mode == "I;16" else image.convert(mode)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory in Linux's /proc")
def test_no_mode_takes_more_than_six_bytes_a_pixel(tmp_path: Path) -> None:
    """With the orientation that needs the most: turned by 90 degrees, where the format has one."""
    image = Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    for image_format, modes in MODES.items():
        options = {"exif": exif} if image_format in ("PNG", "JPEG", "TIFF") else {}
        options |= {"compression": "tiff_adobe_deflate"} if image_format == "TIFF" else {}
        for mode in modes:
            path = tmp_path / f"{image_format}-{mode}"
            made = in_mode(image, mode)
            path.write_bytes(hostile.saved(made, image_format, **options))
            path.with_suffix(".small").write_bytes(hostile.saved(made.crop((0, 0, 8, 8)), image_format, **options))
    paths = sorted(str(path) for path in tmp_path.iterdir() if not path.suffix)
    done = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=True)
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert len(found) == sum(map(len, MODES.values()))
    assert {name: value for name, value in found.items() if not 3.5 < value <= 6} == {}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_turning_in_place_is_what_pillow_does(orientation: int, mode: str) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    noise = np.random.default_rng(3).integers(0, 256, (431, 677, 3), dtype=np.uint8)
    content = hostile.saved(Image.fromarray(noise).convert(mode), "TIFF", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    loaded = load(content)
    assert loaded.size == expected.size and loaded.tobytes() == expected.tobytes()
    loaded.putpixel((0, 0), (1, 2, 3))  # its memory is its own
    assert loaded.getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.filterwarnings("ignore")
def test_every_error_is_one_of_ours_whatever_byte_is_changed() -> None:
    """The files above, each with one byte after another changed."""
    kinds = [hostile.many_scans(16, 12), hostile.many_tiles(4), hostile.run_lengths(4, 4), dotted()]
    rng = np.random.default_rng(1)
    for content in kinds:
        for place in rng.integers(0, len(content), 150):
            damaged = bytearray(content)
            damaged[place] = rng.integers(256)
            try:
                assert load(bytes(damaged), max_pixels=10**6).mode == "RGB"
            except ImageError:
                continue
