"""The command line, one module per command.

In: arguments. Out: results on standard output, messages on standard error, and an exit code (see `main`). `main` puts
the commands together, `arguments` has the options and the error handling that they share. `serve` and `bench_fal` need
extras and are imported only when they are run. Only `florence_onnx.__main__` and tests import this room.
"""
