"""Everything to be known of a card, in few calls: `python -m benchmarks.gpu --device cuda --out $OUT`.

`prepare` makes, on a machine that can export, the folder that travels to a machine with a card and without a network, and prints the
command to run there. `__main__` runs the steps, each in a process of its own, and keeps what they found after every figure.
"""
