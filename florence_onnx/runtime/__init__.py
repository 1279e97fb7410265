"""ONNX Runtime and the devices below it.

In: a graph file and `LoadOptions`. Out: an `Engine`, which runs the graph on host arrays or on buffers that were bound
once (`engine`). `providers` chooses the execution provider and its options, and `sessions` opens the session; `cpu`,
`cuda` and `tensorrt` describe the machine; `graph_cache` caches optimised graphs on disk; `device_memory` and
`cuda_memory` hold tensors where the kernels are. Called by `inference` and `loading`; knows graphs and tensors, not
what they mean.
"""
