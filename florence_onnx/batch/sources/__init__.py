"""Where images come from: files, lists, shards, tables, videos and documents. `open_sources` chooses by name."""

from florence_onnx.batch.sources.opening import SourceOptions, open_sources

__all__ = ["SourceOptions", "open_sources"]
