"""Published checkpoints against this package: does an export answer as transformers does, and as was published?

In: hub ids. Out: rows, one a fact that was tried (`check.check`), which `florence-onnx-export check` prints. It needs a
network; nothing here is needed to export.

    answers    published answers and images, as facts with their sources, and how an answer is compared
    images     finding an image: in a folder of the user, on the hub, at its address
    downloads  what will be downloaded, and removing it again
    rows       the outcomes, as a table, JSON and an exit code
    journal    what was found before an interruption
    check      all of it, model by model
"""
