"""The commands of `florence-onnx-export`, one module each: `export` (`CHECKPOINT OUT`), `verify`, `doctor`, `check` and `push`."""
