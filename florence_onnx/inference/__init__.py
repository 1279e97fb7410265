"""Images and prompts to tokens, on the host or resident on a device.

In: images (or features that were encoded before) and the prompts' `input_ids`. Out: an `EncodedImage` and a
`GeneratedSequence` for each (`answering.Answering.answer`). Called by `model`; knows tokens, never text.

The same three graphs run in two ways. `HostAnswering` moves every tensor through the host and decodes each call's
batch by itself; `DeviceAnswering` leaves features, cross KV and self KV on the device and decodes the prompts of all
callers together:

```text
                 host                                       device
images           HostAnswering: one image a call            DeviceAnswering: up to 8 images a call, decoded meanwhile
  │ vision_encoder.onnx                                       ResidentModel, ResidentVision
features         numpy (N, D)                               DeviceArray (N, D), copied once into the prompt's buffer
  │ text_encoder.onnx
cross KV         new arrays a call                          one buffer, a row of it a prompt
  │ decoder.onnx                                              decoder_top.onnx: the same weights, and the top-k in the graph
self KV          CachedDecoder: slots, written in place     ResidentDecoder: slots, written in place; PromptRows a prompt
scores           AllScores: all logits                      TopScores: the 32 best tokens and the log-sum; all logits when needed
loop             generate.drive, in the caller's thread     ContinuousBatch, in the one thread that has the device
```

Shared by both: the searches, the rule that a row is a set of cache slots (beams are never reordered in memory), and
loading and preprocessing of images. Not shared: the bookkeeping of slots. On the host all prompts of a batch write the
same slot numbers, so that one mask operation serves all of them; on the device prompts enter and leave at any step, so
each has slots of its own (`slot_table`). `transformers_js` runs the other layout of graphs, on the host only.
"""
