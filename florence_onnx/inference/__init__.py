"""Images and prompts to tokens, through the host or resident on a device.

In: images (or images that were encoded before) and the prompts' `input_ids`. Out: an `EncodedImage` and a
`GeneratedSequence` for each prompt (`answering.Answering.answer`). Called by `model` and `loading`; knows tokens, never
text.

The same graphs run in two ways. `HostAnswering` passes every tensor through numpy: the default on CPU and OpenVINO, on
CUDA with `max_batch=0`, and the only way for the transformers.js layout. `DeviceAnswering` keeps tensors where the
kernels are: the default on CUDA, the only way for TensorRT engines, and with `max_batch` on a CPU, where device memory
is host memory.

```text
                     HostAnswering                               DeviceAnswering
image                decoded, preprocessed and encoded           up to 8 a run; meanwhile the next 8 are decoded
  │                  one after the other                         and preprocessed on all cores
  │ vision_encoder   Engine.run                                  ResidentVision
image_features       numpy (N, D)                                DeviceArray (N, D)
  │ text_encoder     TextModel.start: all prompts, one run       ResidentDecoder.add: one prompt a run
cross KV             new arrays for every call                   buffers that are reused, an entry for each prompt
  │ decoder          decoder.onnx                                decoder_top.onnx: the same weights, top-k outputs
self KV              CachedDecoder: updated in place             ResidentDecoder: updated in place; for TensorRT
  │                                                              two sets, read and written by turns
  │ full cache       is compacted, and doubled if need be        reuses free slots, or grows fourfold
scores               AllScores: all logits                       TopScores: top 32 and log-sum; logits on demand
loop                 generate.drive, in the caller's thread      ContinuousBatch, in the device thread
batch                the prompts of one call; arrays shrink      the prompts of all callers, which join and leave
                     when a prompt is finished                   at any step; entries stay where they are
```

Words:

* row: one hypothesis of a prompt; K rows are its K beams, or one when greedy.
* slot: one position of a prompt's self KV cache of capacity C. A row is a set of slots: beams are reordered, and draft
  tokens rejected, by changing masks, and nothing is moved.
* `batch_size`: how many prompts the device buffers hold. `batch_index`: the entry that one of them has from `add` to
  `remove`.

Shared: preparing images (`answering`), the inputs of a decoder call, its causal mask and positions (`decoder_inputs`),
and the searches. The bookkeeping of slots is not shared. On the host all prompts of a batch write to the same slot
numbers, so that one numpy operation serves them all; on the device each prompt began at another step and has its own
`SlotTable`. One class for both would make the host loop over prompts, or write to other slots, which changes the
rounding of its sums. `transformers_js` runs the other layout, whose cache grows by a token a step and is copied when
rows are reordered.
"""
