"""`python -m benchmarks.serving.compare_fal`: fal's Florence-2 and this package on the same questions; as `florence-onnx bench-fal`.

How it is kept fair: the same arguments for all, local images as the same `data:` URI; fal and a server of ours are asked by
the same unmodified `fal_client`; the targets take turns round by round; a call is one HTTP request, so that neither a silent
repetition nor the waiting for the rate is in a time; no features of an image are kept between questions (start a server with
`--cache-mb 0`); the first answer of a target in a process is cold and counted apart. What
cannot be made equal (the network to fal, its hardware, its generation settings) is in the report's remarks.
"""

from __future__ import annotations

from florence_onnx.commands.bench_fal import app

if __name__ == "__main__":
    app()
