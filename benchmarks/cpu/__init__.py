"""How fast on a CPU: this runtime and its peers.

Against other runtimes (`compare`), by stage and task (`bench_stages.py`), start and memory (`cold_start`), by operator
(`operators`), by session option (`session_options`), prompt lookup (`speculation`), and static int8 (`static_int8`).
"""
