"""What lies on disk or on the hub.

In: a directory, a repository's name, or `"demo"`. Out: a `Bundle` (`bundle.read`, `hub.resolve`): where its graphs
are, the model's sizes, its generation defaults, what its verification measured; its tokenizer (`tokenizer`); and what
device memory it is going to need (`memory`). Called by `runtime`, `inference`, `loading` and the export; opens no
session.
"""
