"""Answers on a cluster: Florence-2 as a stage of a Ray Data pipeline. Needs the extra `ray`.

In: a Ray data set with a column of encoded images. Out: one with a row for each image and task, in the columns of
`florence-onnx batch`. Called by users' code and by `commands`; what is asked and answered comes from `batch`.

```text
read ─▶ id, encoded image ─map_batches(Predictor)─▶ rows of text and numbers ─▶ write_parquet, write_json, …
```

`Predictor` is the stage; `pipeline` builds a whole data set of answers from it.
"""

from florence_onnx.ray.columns import Columns
from florence_onnx.ray.pipeline import Actors, answer, run
from florence_onnx.ray.predictor import Predictor

__all__ = ["Actors", "Columns", "Predictor", "answer", "run"]
