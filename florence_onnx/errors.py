"""Every error that florence_onnx raises on purpose, each also the builtin that a caller would expect.

```text
FlorenceError
├── InputError (ValueError)                 what was passed to a call is wrong
│   ├── ImageError                          the image
│   │   ├── ImageNotFoundError (FileNotFoundError)
│   │   ├── ImageDecodeError                not an image, empty, truncated
│   │   ├── ImageTooLargeError              more pixels or bytes than allowed
│   │   └── ImageDownloadError (OSError)    an http(s) URL that did not give an image
│   ├── UnknownTaskError
│   ├── TextInputError                      text missing, empty or superfluous
│   ├── RegionError                         region missing, superfluous or out of range
│   └── OptionsError                        GenerationOptions that contradict each other or the model
├── BundleError                             the model on disk
│   ├── BundleNotFoundError (FileNotFoundError)
│   ├── BundleFileMissingError (FileNotFoundError)
│   ├── BundleFormatError (ValueError)      unreadable, or of another version
│   └── CorruptGraphError (ValueError)      a graph file that does not load
├── ProviderError (RuntimeError)            an execution provider that was asked for and cannot run
│   └── DeviceMemoryError (MemoryError)     a device's memory is full; the model stays usable
├── MissingExtraError (ImportError)         an optional dependency; names the `pip install` line
└── CheckpointError (ValueError)            export: a checkpoint that cannot be converted
    └── VerificationError                   export: the graphs do not reproduce the checkpoint
```
"""

from __future__ import annotations


class FlorenceError(Exception):
    """Base of all errors of this package."""


class InputError(FlorenceError, ValueError):
    """An argument of a call is wrong."""


class ImageError(InputError):
    """The image cannot be used."""


class ImageNotFoundError(ImageError, FileNotFoundError):
    """There is no file at the given path."""


class ImageDecodeError(ImageError):
    """The data is not an image, is empty or is truncated."""


class ImageTooLargeError(ImageError):
    """The image has more pixels or bytes than allowed."""


class ImageDownloadError(ImageError, OSError):
    """An http(s) URL could not be fetched."""


class UnknownTaskError(InputError):
    """No task has that slug or token."""


class TextInputError(InputError):
    """`text_input` is missing, empty, or given to a task that takes none."""


class RegionError(InputError):
    """`region` is missing, malformed, or given to a task that takes none."""


class OptionsError(InputError):
    """Generation options contradict each other or exceed what the model can do."""


class BundleError(FlorenceError):
    """The model on disk cannot be used."""


class BundleNotFoundError(BundleError, FileNotFoundError):
    """Neither a directory nor a hub repository of that name was found."""


class BundleFileMissingError(BundleError, FileNotFoundError):
    """The bundle lacks a file that it needs."""


class BundleFormatError(BundleError, ValueError):
    """The bundle's description is unreadable or of another format."""


class CorruptGraphError(BundleError, ValueError):
    """A graph file is damaged or not an ONNX graph of the expected interface."""


class ProviderError(FlorenceError, RuntimeError):
    """An execution provider that was asked for cannot run here."""


class DeviceMemoryError(ProviderError, MemoryError):
    """The memory of the device, or the part of it that is allowed, does not suffice; the model stays usable."""


class MissingExtraError(FlorenceError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'florence-onnx[{extra}]'")


class CheckpointError(FlorenceError, ValueError):
    """A checkpoint cannot be converted: unknown, missing or wrongly shaped weights, or an unsupported config."""


class VerificationError(CheckpointError):
    """The exported graphs do not reproduce the checkpoint within tolerance."""
