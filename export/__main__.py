"""`python -m export` and `florence-onnx-export`: `CHECKPOINT OUT` exports, `verify BUNDLE` measures what was exported, and
`doctor CHECKPOINT` says beforehand what is peculiar about a checkpoint."""

from __future__ import annotations

import sys

from florence_onnx.errors import MissingExtraError

_EXTRA_PACKAGES = (
    "torch", "transformers", "optimum", "onnx", "onnxruntime", "safetensors", "typer", "rich", "rapidfuzz",
)  # fmt: skip


def main() -> None:
    """Runs the command line; without the packages of the extra it says how to install them and exits with 2.

    A first argument `verify` or `doctor` is the command; a checkpoint of that name is `./verify`.
    """
    try:
        if sys.argv[1:2] == ["verify"]:  # needs no torch where the reference is a bundle
            from .commands.verify import main as run
        elif sys.argv[1:2] == ["doctor"]:
            from .commands.doctor import main as run
        else:
            from .commands.export import main as run
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA_PACKAGES:
            raise
        sys.stderr.write(f"{MissingExtraError(package, 'export')}\n")
        raise SystemExit(2) from None
    run()


if __name__ == "__main__":
    main()
