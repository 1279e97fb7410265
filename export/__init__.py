"""Export scripts: a PyTorch checkpoint of Florence-2 becomes ONNX. Needs the extra `[export]`."""
