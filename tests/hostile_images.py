"""Small files that cost an image loader much: one function a kind, which returns the bytes of a file.

Used by the tests, which assert what becomes of them, and by `benchmarks.serving.image_costs`, which measures it.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
PNG_HEAD = b"\x89PNG\r\n\x1a\n"


def saved(image: Image.Image, image_format: str, **options: Any) -> bytes:
    """An image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------------------------- PNG


def chunk(name: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, *, depth: int = 8, colour: int = 0, interlaced: bool = False) -> bytes:
    """A black PNG, made without holding its pixels; colour 0 is grey, 2 RGB, 3 palette, 6 RGBA."""
    channels = {0: 1, 2: 3, 3: 1, 6: 4}[colour]
    packer = zlib.compressobj(1)
    rows = [(width, height)]
    if interlaced:
        passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
        rows = [((width - x + across - 1) // across, (height - y + down - 1) // down) for x, y, across, down in passes]
    parts = [
        packer.compress(b"\0" + bytes((columns * channels * depth + 7) // 8))
        for columns, count in rows
        for _ in range(count)
    ]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced)))
    palette = chunk(b"PLTE", bytes(768)) if colour == 3 else b""
    return PNG_HEAD + header + palette + chunk(b"IDAT", b"".join(parts) + packer.flush()) + chunk(b"IEND", b"")


def with_chunks(content: bytes, chunks: bytes) -> bytes:
    """A PNG with chunks added before its pixels."""
    place = content.index(b"IDAT") - 4
    return content[:place] + chunks + content[place:]


def compressed_text(num_bytes: int) -> bytes:
    """A chunk of compressed text, as image generators write their workflow."""
    return chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"{}" * (num_bytes // 2)))


def colour_profile(num_bytes: int) -> bytes:
    """A chunk with an ICC profile that does not compress."""
    import random

    return chunk(b"iCCP", b"printer\0\0" + zlib.compress(random.Random(0).randbytes(num_bytes)))


# ---------------------------------------------------------------------------------------------------------------- JPEG


def many_scans(size: int, num_scans: int) -> bytes:
    """A progressive JPEG with as many scans: its last one is repeated."""
    data = saved(Image.new("L", (size, size), 128), "JPEG", progressive=True)
    start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    repeated = num_scans - data.count(b"\xff\xda") + 1
    return data[:start] + data[start:end] * repeated + data[end:]


def many_segments(num_segments: int) -> bytes:
    """A JPEG with empty segments before its pixels."""
    data = saved(Image.new("RGB", (32, 32)), "JPEG")
    return data[:2] + b"\xff\xe5\x00\x02" * num_segments + data[2:]


def shared_tags(num_tags: int, num_bytes: int) -> bytes:
    """TIFF tags that all point to the same bytes, each of which a reader copies."""
    first = 8 + 2 + 12 * num_tags + 4
    entries = b"".join(struct.pack("<HHII", 40000 + index, 7, num_bytes, first) for index in range(num_tags))
    return b"II*\0" + struct.pack("<IH", 8, num_tags) + entries + bytes(4) + bytes(num_bytes)


def jpeg_with_shared_tags() -> bytes:
    """A JPEG whose EXIF data of 64 kB would be read as 140 MB."""
    exif = b"Exif\0\0" + shared_tags(2500, 32_000)
    data = saved(Image.new("RGB", (32, 32)), "JPEG")
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]


# ---------------------------------------------------------------------------------------------------------------- TIFF


def tiff(tags: dict[int, tuple[int, list[int]]], data: bytes = b"") -> bytes:
    """A TIFF of one directory: tags, with type (3 is 16 bits, 4 is 32) and values, and the data of its pixels at 8."""
    letters = {3: "H", 4: "I"}
    position, entries, values = 8 + len(data), b"", b""
    table = 2 + 12 * len(tags) + 4
    for number, (kind, numbers) in sorted(tags.items()):
        packed = struct.pack(f"<{len(numbers)}{letters[kind]}", *numbers)
        if len(packed) > 4:
            place = struct.pack("<I", position + table + len(values))
            values += packed
        else:
            place = packed.ljust(4, b"\0")
        entries += struct.pack("<HHI", number, kind, len(numbers)) + place
    return b"II*\0" + struct.pack("<I", position) + data + struct.pack("<H", len(tags)) + entries + bytes(4) + values


def huge_tile(side: int) -> bytes:
    """A TIFF of 10 x 10 in one tile of `side` squared, whose data decodes to all of it."""
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(side)) for _ in range(side)) + packer.flush()
    return tiff(
        {
            **{256: (3, [10]), 257: (3, [10]), 258: (3, [8]), 259: (3, [8]), 262: (3, [1]), 277: (3, [1])},
            **{322: (4, [side]), 323: (4, [side]), 324: (4, [8]), 325: (4, [len(data)])},
        },
        data,
    )


def many_tiles(num_tiles: int) -> bytes:
    """An uncompressed TIFF in tiles of one pixel."""
    offsets = [8] * num_tiles
    return tiff(
        {
            **{256: (4, [num_tiles]), 257: (4, [1]), 258: (3, [8]), 259: (3, [1]), 262: (3, [1]), 277: (3, [1])},
            **{322: (4, [1]), 323: (4, [1]), 324: (4, offsets), 325: (4, [1] * num_tiles)},
        },
        bytes(16),
    )


# ---------------------------------------------------------------------------------------------------------- GIF and BMP


def gif_with_comments(num_bytes: int, block: int = 255) -> bytes:
    """A GIF with a comment in many blocks before its first frame."""
    data = saved(Image.new("P", (32, 24), 1), "GIF")
    place = 13 + (3 << (data[10] & 7) + 1)
    comment = b"\x21\xfe" + (bytes([block]) + b"c" * block) * (num_bytes // block) + b"\0"
    return data[:place] + comment + data[place:]


def run_lengths(width: int, height: int) -> bytes:
    """A BMP of one pixel a line, the rest of which Pillow fills a pixel at a time."""
    data = b"\1\0\0\0" * height + b"\0\1"
    palette = bytes(4 * 256)
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    start = 14 + len(head) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + head + palette + data


# --------------------------------------------------------------------------------------------------- files around files


def iptc(inner: bytes) -> bytes:
    """An IPTC file of 10 x 10 whose plugin opens what is inside with any other one."""

    def field(record: int, number: int, data: bytes) -> bytes:
        return bytes([0x1C, record, number]) + struct.pack(">H", len(data)) + data

    out = field(3, 60, b"\1\0") + field(3, 20, b"\0\x0a") + field(3, 30, b"\0\x0a") + field(3, 120, b"\5")
    parts = (field(8, 10, inner[start : start + 30000]) for start in range(0, len(inner), 30000))
    return out + b"".join(parts) + bytes(8)


def blp1(inner: bytes) -> bytes:
    """A BLP1 of 10 x 10 around a JPEG."""
    head = b"BLP1" + struct.pack("<iIII", 0, 0, 10, 10) + struct.pack("<ii", 0, 0)
    offsets = struct.pack("<16I", 28 + 128 + 8, *[0] * 15) + struct.pack("<16I", len(inner), *[0] * 15)
    return head + offsets + struct.pack("<I", 0) + bytes(4) + inner


def icns(inner: bytes) -> bytes:
    """An ICNS around a PNG, which claims to be of 128 x 128."""
    body = b"ic07" + struct.pack(">I", len(inner) + 8) + inner
    return b"icns" + struct.pack(">I", len(body) + 8) + body


def ico(inner: bytes) -> bytes:
    """An ICO of 16 x 16 around a PNG."""
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + inner


# ---------------------------------------------------------------------------------------------------------- many frames


def frames(image_format: str, num_frames: int, side: int = 16, **options: Any) -> bytes:
    """An animation, or several images in one file."""
    images = [Image.new("RGB", (side, side), (index * 50 % 256, index % 256, 0)) for index in range(num_frames)]
    return saved(images[0], image_format, save_all=True, append_images=images[1:], **options)
