"""Models on disk and on the hub.

In: a directory, the name of a hub repository, or `"demo"`. Out: a `Bundle` (`bundle.read`, `hub.resolve`) with the
paths of its graphs, the model's sizes, its generation defaults and what its verification measured; its tokenizer
(`tokenizer`); and an estimate of the device memory that it needs (`memory`). Called by `runtime`, `inference`,
`loading` and the export; opens no session.
"""
