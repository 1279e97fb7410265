"""The command line: `florence-onnx-export CHECKPOINT OUT` and `florence-onnx-export verify`."""
