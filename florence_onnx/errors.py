"""All errors that florence_onnx raises on purpose. Each is also the builtin exception that a caller would expect.

```text
FlorenceError
├── InputError (ValueError)                 an argument of a call is wrong
│   ├── ImageError                          the image cannot be used
│   │   ├── ImageNotFoundError (FileNotFoundError)
│   │   ├── ImageDecodeError                not an image, empty, truncated
│   │   ├── ImageTooLargeError              more pixels or bytes than allowed
│   │   └── ImageDownloadError (OSError)    an http(s) URL that did not return an image
│   ├── UnknownTaskError
│   ├── TextInputError                      text_input missing, blank, or not taken by the task
│   ├── RegionError                         region missing, out of range, or not taken by the task
│   └── OptionsError                        GenerationOptions that contradict each other or the model
├── BundleError                             the model on disk cannot be used
│   ├── BundleNotFoundError (FileNotFoundError)
│   ├── BundleFileMissingError (FileNotFoundError)
│   ├── BundleFormatError (ValueError)      unreadable, or of another version
│   └── CorruptGraphError (ValueError)      a graph file that does not load
├── ProviderError (RuntimeError)            a requested execution provider cannot run
│   └── DeviceMemoryError (MemoryError)     memory is full, the device's or the computer's
├── DeadlineError (TimeoutError)            a call took longer than its `deadline`, and was to raise then
├── CancelledError (RuntimeError)           a call was ended by its `Cancel`, and was to raise then
├── HubError (OSError)                      a push or a pull that the model hub refused, or could not be reached for
│   └── HubAccessError (PermissionError)    no token, a wrong one, or one that may not write
├── MissingExtraError (ImportError)         an optional dependency is missing; has the `pip install` line
└── CheckpointError (ValueError)            export: a checkpoint that cannot be converted
    └── VerificationError                   export: the graphs do not reproduce the checkpoint
```
"""

from __future__ import annotations


class FlorenceError(Exception):
    """Base class of all errors of this package."""

    index: int | None = None
    """Of an error that concerns one image of a batch: which, from 0. Its message begins `image 17 of 64: ` for index 16."""


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
    """An http(s) URL could not be fetched, or returned no image."""


class UnknownTaskError(InputError):
    """No task has that slug or token."""


class TextInputError(InputError):
    """`text_input` is missing, blank, or given to a task that takes none."""


class RegionError(InputError):
    """`region` is missing, malformed, or given to a task that takes none."""


class OptionsError(InputError):
    """Generation options contradict each other, or exceed a limit of the model."""


class BundleError(FlorenceError):
    """The model on disk cannot be used."""


class BundleNotFoundError(BundleError, FileNotFoundError):
    """Neither a directory nor a hub repository of that name was found."""


class BundleFileMissingError(BundleError, FileNotFoundError):
    """A file of the bundle is missing."""


class BundleFormatError(BundleError, ValueError):
    """The bundle's description is unreadable or of an unsupported format version."""


class CorruptGraphError(BundleError, ValueError):
    """A graph file is damaged, or is not an ONNX graph with the expected inputs."""


class ProviderError(FlorenceError, RuntimeError):
    """A requested execution provider cannot run here."""


class DeviceMemoryError(ProviderError, MemoryError):
    """Memory is full: that of the device, or on a CPU the computer's own; or the part of it that may be used.

    A model that was loaded before stays usable.
    """


class DeadlineError(FlorenceError, TimeoutError):
    """A call took longer than its `deadline`, and `on_deadline="raise"` was given."""


class CancelledError(FlorenceError, RuntimeError):
    """A call was ended by its `Cancel` token, and `on_deadline="raise"` was given."""


class HubError(FlorenceError, OSError):
    """The model hub refused a push or a pull, or could not be reached."""


class HubAccessError(HubError, PermissionError):
    """The hub was given no token, a wrong one, or one without the right to do this."""


class MissingExtraError(FlorenceError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'florence-onnx[{extra}]'")


class CheckpointError(FlorenceError, ValueError):
    """A checkpoint cannot be converted: unknown, missing or wrongly shaped weights, or an unsupported config."""


class VerificationError(CheckpointError):
    """The exported graphs do not reproduce the checkpoint within the tolerance."""
