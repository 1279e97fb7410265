"""ONNX Runtime and the devices under it.

In: a graph file and `LoadOptions`. Out: an `Engine` that runs it with arrays of the host, or with buffers bound once
(`engine`). Which execution provider, with which options, is decided in `providers` and `sessions`; `cuda`, `tensorrt`,
`cpu` know the machine, `graph_cache` keeps optimised graphs, `device_memory` and `cuda_memory` hold tensors where the
kernels are. Called by `inference` and `loading`; knows graphs and tensors, not what they mean.
"""
