"""PyTorch modules to ONNX graphs.

In: a `Checkpoint`. Out: `vision_encoder.onnx`, `text_encoder.onnx`, `decoder.onnx` (`plans.export_graphs`), each
compared with its PyTorch module, and `decoder_top.onnx`, which shares the decoder's weights (`top_scores`). `vision`
and `text` are the modules as they are traced.
"""
