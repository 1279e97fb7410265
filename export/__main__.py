"""`python -m export` and `florence-onnx-export`: `CHECKPOINT OUT` exports, `verify BUNDLE…` measures bundles, and
`doctor CHECKPOINT` examines a checkpoint before an export."""

from __future__ import annotations

import sys

from florence_onnx.errors import MissingExtraError

_EXTRA_PACKAGES = (
    "torch", "transformers", "optimum", "onnx", "onnxruntime", "safetensors", "typer", "rich", "rapidfuzz",
)  # fmt: skip


def main() -> None:
    """Runs the command line. If a package of the extra is missing, says how to install it and exits with 2.

    `verify` or `doctor` as the first argument is the command; a checkpoint of that name is written as `./verify`.
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
