"""The classes of transformers that Florence-2 tools use, on this runtime: no PyTorch, numpy arrays instead of tensors.

In: the calls that a tool makes on a processor and a model. Out: what transformers returns, as numpy arrays, strings and dicts. Called by
users' code instead of `transformers`:

```python
from florence_onnx.compat import AutoModelForCausalLM, AutoProcessor  # instead of: from transformers import …

processor = AutoProcessor.from_pretrained("microsoft/Florence-2-base", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("microsoft/Florence-2-base", trust_remote_code=True).to("cuda").eval()
inputs = processor(text="<OD>", images=image, return_tensors="pt").to("cuda")
ids = model.generate(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], max_new_tokens=1024, num_beams=3)
text = processor.batch_decode(ids, skip_special_tokens=False)[0]
answer = processor.post_process_generation(text, task="<OD>", image_size=image.size)
```

Only what the tools call is there. Where an argument would change the answer and is not supported, it is an error that names it.
"""

from florence_onnx.compat.arrays import Array, BatchFeature
from florence_onnx.compat.model import Florence2ForConditionalGeneration
from florence_onnx.compat.processor import Florence2Processor

AutoProcessor = Florence2Processor
AutoModelForCausalLM = AutoModelForVision2Seq = AutoModelForImageTextToText = Florence2ForConditionalGeneration

__all__ = [
    "Array",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForVision2Seq",
    "AutoProcessor",
    "BatchFeature",
    "Florence2ForConditionalGeneration",
    "Florence2Processor",
]
