"""`florence-onnx bench-fal`: compares fal's Florence-2 and this package by time, price and agreement.

In: a plan of calls, the targets, and a limit on the paid calls to fal. Out: a journal of all results, from which an
interrupted comparison resumes, and a report as Markdown and JSON. `plan` lists the calls, `targets` and `transport`
make them, `budget` and `rate_limit` limit how many go to fal and how fast, `journal` records them, `runner` is the
loop, `agreement` and `figures` evaluate, and `report` writes. Only `florence_onnx.commands.bench_fal` and tests import
this room. Needs the extra `fal`.

Fairness: every target gets the same arguments, local images as the same `data:` URI. Targets take turns round by round.
fal and a server are called through the same unmodified `fal_client`. A call is one HTTP request, so that no time
includes a retry or a wait. The first call to each target in a process is cold and is reported apart.
"""
