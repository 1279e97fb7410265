"""The command line: one module a command.

In: arguments. Out: results on standard output, everything else on standard error, and an exit code. `main` assembles
the commands, `arguments` has what they share. Called by `florence_onnx.__main__` alone; nothing imports it. `serve`
and `bench_fal` are imported when they are asked for, because they need extras.
"""
