"""How good a model's boxes and their scores are, on images whose contents are known. Needs the extra `evaluate`.

```text
coco ─▶ asking ─▶ measuring ─▶ report
            └───▶ calibrating ─▶ a calibration file
```
"""
