"""An HTTP server with fal's API, and a page to try it: `florence-onnx serve`. Needs the extra `serve`.

In: HTTP requests in fal's format, direct or through the queue, and uploads. Out: fal's JSON, Prometheus metrics and an
access log. `middleware` checks every request, the `*_routes` modules handle it, and `context` holds what they share:
one `florence_onnx.fal.service.Service`, the stored files and the results of the queue. `static/` is the page. Only
`florence_onnx.commands` and tests import this room; `serve.serve` is its entry point.
"""
