"""Finding the images of published answers: in the user's folder, then on the hub or at their address."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from florence_onnx.bundles.bundle import sha256
from florence_onnx.bundles.hub import connection_errors
from florence_onnx.errors import ImageDownloadError, ImageError, ImageNotFoundError
from florence_onnx.images import decoding
from florence_onnx.images.download import download

from .answers import PublishedImage

MAX_BYTES = 32 * 2**20
"""Most bytes of an image."""
TIMEOUT = 60.0
"""Seconds for the download of an image."""


@dataclass(frozen=True)
class FoundImage:
    """A file that is the published image, as far as is known."""

    path: Path
    sha256: str
    is_known: bool
    """Whether the hash was known and is equal; otherwise only the size in pixels was compared."""


def find_image(wanted: PublishedImage, folder: Path | None, downloads: Path) -> FoundImage:
    """Finds an image.

    Args:
        wanted: The image.
        folder: A folder of the user with images under their published names; None for none.
        downloads: Where to put what is downloaded.

    Raises:
        ImageError: It cannot be had, or is another image; the message says where it was looked for and what to do.
    """
    own = None if folder is None else folder / wanted.image
    path = own if own is not None and own.is_file() else _fetch(wanted, downloads)
    found = sha256(path)
    size = _load(path).size
    if size != tuple(wanted.size):
        raise ImageError(
            f"{path} is another image than the published {wanted.image}: {size[0]} × {size[1]} pixels instead of "
            f"{wanted.size[0]} × {wanted.size[1]}"
        )
    if wanted.sha256 not in (None, found):
        raise ImageError(f"{path} is another file than the published {wanted.image}: its SHA-256 is {found}")
    return FoundImage(path, found, wanted.sha256 is not None)


def _load(path: Path) -> Image.Image:
    return decoding.load(path, apply_exif=False)  # as the scripts that the answers come from read it


def _fetch(wanted: PublishedImage, downloads: Path) -> Path:
    try:
        if wanted.repository is not None and wanted.path is not None:
            return _fetch_from_hub(wanted.repository, wanted.path, downloads)
        if wanted.url is not None:
            return _fetch_url(wanted.url, downloads / wanted.image)
    except ImageDownloadError as error:
        raise ImageDownloadError(f"{error}; get {wanted.image} elsewhere and give its folder with --images") from error
    raise ImageNotFoundError(f"no address of {wanted.image} is known; put it into a folder and give it with --images")


def _fetch_url(url: str, path: Path) -> Path:
    if not path.is_file():
        content = download(url, max_bytes=MAX_BYTES, timeout=TIMEOUT)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return path


def _fetch_from_hub(repository: str, path: str, downloads: Path) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    endpoint = os.environ.get("HF_ENDPOINT")  # the client itself reads this only when it is imported
    try:
        return Path(
            hf_hub_download(repository, path, repo_type="dataset", local_dir=downloads / repository, endpoint=endpoint)
        )
    except (HfHubHTTPError, *connection_errors()) as error:
        raise ImageDownloadError(f"cannot download {path} of the data set {repository}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
