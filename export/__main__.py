"""`python -m export` and `florence-onnx-export`: `CHECKPOINT OUT` exports, and these as the first argument do more.

verify BUNDLE…         measures how much bundles agree with fp32
doctor CHECKPOINT      examines a checkpoint before an export
push OUT OWNER/NAME    publishes bundles on the hub
pull OWNER/NAME [DIR]  downloads and checks them; the same as `florence-onnx pull`
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from florence_onnx.errors import MissingExtraError

_EXTRA_PACKAGES = (
    "torch", "transformers", "optimum", "onnx", "onnxruntime", "safetensors", "typer", "rich", "rapidfuzz",
)  # fmt: skip


def _command(name: str) -> Callable[[], None]:
    """What runs the command of a name; `export` for every other name, which is then a checkpoint."""
    if name == "verify":  # needs no torch where the reference is a bundle
        from .commands.verify import main as run
    elif name == "doctor":
        from .commands.doctor import main as run
    elif name == "check":
        from .commands.check import main as run
    elif name == "push":
        from .commands.push import main as run
    elif name == "pull":
        from florence_onnx.commands.pull import main as run
    else:
        from .commands.export import main as run
    return run


def main() -> None:
    """Runs the command line. If a package of the extra is missing, says how to install it and exits with 2.

    A command's name as the first argument is the command; a checkpoint of that name is written as `./verify`.
    """
    try:
        run = _command(sys.argv[1] if len(sys.argv) > 1 else "")
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA_PACKAGES:
            raise
        sys.stderr.write(f"{MissingExtraError(package, 'export')}\n")
        raise SystemExit(2) from None
    run()


if __name__ == "__main__":
    main()
