"""`florence-onnx bench-fal`: the same questions to fal's Florence-2 and to this package: time, price and agreement.

`plan` says which calls, `targets` who answers, `budget` and `pace` how many and how often, `journal` what was answered
already, `runner` does it, `agreement` and `figures` measure, `report` shows, `command` is the command line.

How it is kept fair: every target gets the same arguments, local images as the same `data:` URI; targets take turns
round by round; fal and a server are asked by the same unmodified `fal_client`; a call is one HTTP request, so that no
waiting before a repetition is in a time; the first call of a target in a process is cold and counted apart.
"""
