"""Bulk work: from folders, lists, shards, tables, videos and documents to rows of answers.

```text
sources ─▶ items ─▶ answering (in this process, or in several) ─▶ rows ─▶ outputs ─▶ files that can be continued
```

`answer` takes items and yields rows; `run` is the command `florence-onnx batch`.
"""

from florence_onnx.batch.answering import answer
from florence_onnx.batch.items import Item
from florence_onnx.batch.job import Job, Summary, run
from florence_onnx.batch.rows import Row

__all__ = ["Item", "Job", "Row", "Summary", "answer", "run"]
