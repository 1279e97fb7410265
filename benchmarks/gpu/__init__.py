"""The GPU path, measured in few calls: `python -m benchmarks.gpu --device cuda --out $OUT`.

`prepare` makes, on a machine that can export, the folder to copy to a machine with a GPU and without a network, and
prints the command to run there. `__main__` runs the steps (`steps`), each in a process of its own (`worker`), and saves
the results after every figure.
"""
