"""Pages of PDF documents, by pypdfium2. Needs the extra `pdf`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from florence_onnx.batch.items import Item, failed
from florence_onnx.errors import ImageDecodeError, ImageTooLargeError, InputError, MissingExtraError

POINTS = 72
"""PDF's units in an inch."""


class Document:
    """The pages of a document, drawn at a resolution."""

    def __init__(self, path: Path, dpi: float, max_pixels: int) -> None:
        """Args:
        path: Of the file.
        dpi: Pixels in an inch.
        max_pixels: Larger pages are errors.

        Raises:
            InputError: `dpi` is out of range.
            MissingExtraError: pypdfium2 is not installed.
        """
        try:
            import pypdfium2  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("pypdfium2", "pdf") from error
        if not 10 <= dpi <= 1200:
            raise InputError(f"dpi must be from 10 to 1200, got {dpi!r}")
        self._path, self._dpi, self._max_pixels = path, dpi, max_pixels

    @property
    def total(self) -> int | None:
        import pypdfium2

        try:
            with pypdfium2.PdfDocument(self._path) as document:
                return len(document)
        except (pypdfium2.PdfiumError, OSError):
            return 1  # the row of its error

    def __iter__(self) -> Iterator[Item]:
        import pypdfium2

        try:
            with pypdfium2.PdfDocument(self._path) as document:
                for number in range(len(document)):
                    yield self._page(document, number)
        except (pypdfium2.PdfiumError, OSError) as error:
            yield failed(str(self._path), str(self._path), ImageDecodeError(f"{self._path} cannot be read: {error}"))

    def _page(self, document: object, number: int) -> Item:
        import pypdfium2

        source = f"{self._path}#page={number + 1}"
        scale = self._dpi / POINTS
        try:
            page = document[number]  # type: ignore[index]
            width, height = (max(1, round(side * scale)) for side in page.get_size())
            if width * height > self._max_pixels:
                raise ImageTooLargeError(
                    f"{source} would have {width} x {height} pixels at {self._dpi:g} dpi, more than {self._max_pixels:,}: "
                    "give a lower --dpi"
                )
            image = page.render(scale=scale).to_pil().convert("RGB")
            page.close()
            return Item(source, source, image)
        except (pypdfium2.PdfiumError, ImageTooLargeError, ValueError, OverflowError) as error:
            return failed(source, source, error)
