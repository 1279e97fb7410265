"""The server that speaks fal's API: `florence-onnx serve`. Needs the extra `serve`."""
