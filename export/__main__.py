"""`python -m export` and `florence-onnx-export`."""

from __future__ import annotations

import sys

from florence_onnx.errors import MissingExtraError

_EXTRA_PACKAGES = ("torch", "transformers", "optimum", "onnx", "onnxruntime", "safetensors", "typer", "rich")


def main() -> None:
    """Runs the command line; without the packages of the extra it says how to install them and exits with 2."""
    try:
        from . import cli
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA_PACKAGES:
            raise
        sys.stderr.write(f"{MissingExtraError(package, 'export')}\n")
        raise SystemExit(2) from None
    cli.main()


if __name__ == "__main__":
    main()
