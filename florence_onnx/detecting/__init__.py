"""A list of classes in one image, with an honest "not there".

In: an image and the names of classes. Out: `Detections`, the boxes by class. Called by `model`, which hands over itself;
knows no graphs and no tokens.

Each class is a prompt of its own, since prompts that join several classes lose objects; all of them share the encoded image
and are decoded in batches. A published checkpoint answers a class that is not in the image all the same, so each box gets a
value by one of the rules in `absence`, and those below a threshold are dropped.
"""
