"""The command line: `florence-onnx-export CHECKPOINT OUT`, `florence-onnx-export verify` and `florence-onnx-export doctor`."""
