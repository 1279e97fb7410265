"""fal's Florence-2 against this package: `python -m benchmarks.serving.compare_fal`, or `florence-onnx bench-fal`.

How it is kept fair: all targets get the same arguments, and local images as the same `data:` URI. fal and our server
are called with the same unmodified `fal_client`. The targets take turns in every round. A call is one HTTP request, so
that no silent retry and no waiting for a rate limit is in a time. Image features are not cached between requests (start
the server with `--cache-mb 0`). The first answer of a target in a process is cold and counted separately. What cannot
be made equal (the network to fal, its hardware, its generation settings) is in the report's remarks.
"""

from __future__ import annotations

from florence_onnx.commands.bench_fal import app

if __name__ == "__main__":
    app()
