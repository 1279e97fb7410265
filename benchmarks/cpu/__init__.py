"""How fast on a CPU: peers side by side (`compare`), our own stages (`bench_stages.py`), start and memory (`cold_start`), and why."""
