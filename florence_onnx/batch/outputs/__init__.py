"""Files of rows that can be continued after any end: JSON lines, parquet, webdataset's shards.

What is in a file when its process is killed is found again: complete rows count, a half-written one is taken away. Rows reach
the operating system one by one, and the disk every `SYNC_SECONDS` and at the end.
"""

from florence_onnx.batch.outputs.opening import FORMS, SHARD_ROWS, Output, open_output
from florence_onnx.batch.outputs.reading import read_rows

__all__ = ["FORMS", "SHARD_ROWS", "Output", "open_output", "read_rows"]
