"""Entry point of `florence-onnx` and `python -m florence_onnx`."""

from __future__ import annotations

import io
import sys

from florence_onnx.errors import MissingExtraError

_CLI_PACKAGES = ("typer", "rich")


def main() -> None:
    """Runs the command line; without the packages of the `cli` extra, says how to install them and exits with 2."""
    try:
        from florence_onnx.commands import main as cli
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _CLI_PACKAGES:
            raise
        sys.stderr.write(f"{MissingExtraError(package, 'cli')}\n")
        raise SystemExit(2) from None
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Labels may be in any script, whatever the code page of the terminal, and a file name need not be valid
        # Unicode: printing either must not raise UnicodeEncodeError.
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    cli.app()


if __name__ == "__main__":
    main()
