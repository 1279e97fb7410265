"""Answers in the forms that other tools read: annotation tools, trainers, and readers of documents.

```text
rows ─▶ labelled ─▶ boxes | label_studio | pages | searchable_pdf | gallery ─▶ files
```

`florence-onnx convert` writes the rows of a batch job; `Prediction.to_coco` and its like one answer. supervision writes COCO, YOLO, VOC
and LabelMe too, but reads every image for it and leaves scores and quads out; so these are written here, and its loaders are the tests.
"""
