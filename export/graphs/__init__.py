"""PyTorch modules to ONNX graphs, in fp32.

In: a `Checkpoint`. Out: `vision_encoder.onnx`, `text_encoder.onnx` and `decoder.onnx` (`plans.export_graphs`), each
compared with its PyTorch module, and `decoder_top.onnx`, the decoder with top-k outputs (`top_k.add_top_k`).

    vision_encoder, text_encoder, decoder   the modules that are traced; `attention` has what they share
    plans         names, example inputs and dynamic axes of the three graphs
    exporter      one module to one file, through optimum
    comparison    a graph against its module
    files         reading, tidying and writing `.onnx` files
    top_k         top-k outputs for a decoder graph
"""
