"""Aggregating the output of the workers into one result: minima and medians, derived stages, floors, checks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.costs import WEIGHT_BITS, Costs
from benchmarks.cpu.jobs import DERIVED, NUM_FIRST_TOKENS, Peer, Workload
from benchmarks.cpu.peers import REFERENCE

Run = Mapping[str, Any]
"""The output of one worker."""
Summary = dict[str, Any]


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Returns `min`, `median` and the `samples`."""
    return {"min": min(samples), "median": statistics.median(samples), "samples": [round(x, 6) for x in samples]}


def summarize(peer: Peer, runs: Sequence[Run], workload: Workload) -> Summary:
    """Aggregates one peer over all its rounds."""
    names = runs[0]["stages"]
    stages = {name: spread([sample for run in runs for sample in run["stages"][name]]) for name in names}
    for derived in (name for name in DERIVED if f"answer_{name.removeprefix('step_')}" in stages):
        stages[derived] = _step(stages, derived.removeprefix("step_"), workload.num_tokens)
    notes = list(dict.fromkeys(note for run in runs for note in run["notes"]))
    if any(run["tokens"] != runs[0]["tokens"] for run in runs):
        notes.append("its tokens differ from round to round")
    return {
        "title": peer.title,
        "precision": runs[0].get("precision", peer.precision),
        "is_exact": peer.is_exact,
        "stages": stages,
        "load": spread([run["load_s"] for run in runs]),
        "cold_start": spread([run["cold_start_s"] for run in runs]),
        "peak_rss": spread([run["peak_rss_bytes"] for run in runs]),
        "tokens": runs[0]["tokens"],
        "versions": runs[0]["versions"],
        "notes": notes,
    }


def _step(stages: Mapping[str, Any], search: str, num_tokens: int) -> dict[str, Any]:
    """Returns the time per decode step from differences of minima and of medians.

    Differences of single runs would be too small whenever something delayed the short run.
    """
    whole, first = stages[f"answer_{search}"], stages[f"first_tokens_{search}"]
    steps = num_tokens - NUM_FIRST_TOKENS
    return {name: (whole[name] - first[name]) / steps for name in ("min", "median")}


def agreement(tokens: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Returns, by search, the share of positions with the same token."""
    return {
        search: sum(a == b for a, b in zip(ids, expected[search], strict=False)) / max(len(ids), len(expected[search]))
        for search, ids in tokens.items()
        if search in expected
    }


def compare_tokens(peers: dict[str, Summary], num_tokens: int) -> list[str]:
    """Adds to every peer its `agreement` with the reference, and returns a list of faults."""
    expected = peers.get(REFERENCE, {}).get("tokens")
    wrong = []
    for name, peer in peers.items():
        lengths = {search: len(ids) for search, ids in peer["tokens"].items()}
        if set(lengths.values()) != {num_tokens}:
            wrong.append(f"{name} gave {lengths} tokens instead of {num_tokens}: its times cannot be compared")
        if expected is None:
            continue
        peer["agreement"] = agreement(peer["tokens"], expected)
        if peer["is_exact"] and min(peer["agreement"].values()) < 1:
            shares = ", ".join(f"{search} {share:.0%}" for search, share in peer["agreement"].items())
            wrong.append(f"{name} gives other tokens than {REFERENCE}: equal are {shares}")
    return wrong


MIN_FLOOR_SHARE = 0.85
"""Smallest plausible share of the floor: our graphs save 6 % of the counted operations, and rates are noisy."""


def find_implausible(peers: Mapping[str, Summary], floor: Mapping[str, Any]) -> list[str]:
    """Finds peers that were faster than the machine can be, and so did less work than the others.

    Only stages limited by arithmetic are checked: a decode step is limited by memory, and the weights of a small
    decoder fit into the CPU's cache.
    """
    wrong = []
    for name, peer in peers.items():
        bounds = floor["stages"].get(peer["precision"], {})
        for stage in ("vision", "text_encoder"):
            if stage in peer["stages"] and stage in bounds:
                share = peer["stages"][stage]["min"] / bounds[stage]
                if share < MIN_FLOOR_SHARE:
                    wrong.append(f"{name} took {share:.2f} of the floor for {stage}: it cannot have done the same work")
    return wrong


def best_rates(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the highest of each rate over all rounds, since the floor is about the undisturbed machine."""
    names = ("fp32", "int8", "bf16", "read")
    best: dict[str, Any] = {name: max((each[name] for each in rounds if each[name]), default=None) for name in names}
    return {**best, "by_shape": rounds[0]["by_shape"]}


def floors(costs: Costs, rates: Mapping[str, Any], workload: Workload, prompt_tokens: int) -> dict[str, Any]:
    """Computes the floor in seconds by precision and stage; returns it with the figures behind it."""
    compute = {
        "fp32": rates["fp32"],
        "fp16": rates["fp32"],  # ONNX Runtime's CPU provider computes fp16 products in fp32
        "bf16": max(rates["fp32"], rates["bf16"] or 0),
        "int8": max(rates["fp32"], rates["int8"]),
        "int4": max(rates["fp32"], rates["int8"]),  # 4-bit weights are multiplied as 8 bits
    }
    found = {}
    for precision in WEIGHT_BITS:
        found[precision] = _floor(costs, precision, compute[precision], rates["read"], workload, prompt_tokens)
    return {
        "rates": dict(rates),
        "vision_flops": costs.vision_flops(),
        "text_encoder_flops": costs.text_encoder_flops(prompt_tokens),
        "decoder_parameters": costs.decoder_parameters(),
        "prompt_tokens": prompt_tokens,
        "stages": found,
    }


def _floor(
    costs: Costs, precision: str, rate: float, read: float, workload: Workload, prompt_tokens: int
) -> dict[str, float]:
    stages = {
        "vision": costs.vision_flops() / rate,
        "text_encoder": costs.text_encoder_flops(prompt_tokens) / rate,
    }
    for search, beams in (("greedy", 1), ("beams", workload.num_beams)):
        past = workload.num_tokens // 2
        size = costs.step_bytes(precision, prompt_tokens=prompt_tokens, past=past, num_beams=beams)
        stages[f"step_{search}"] = (size or 0) / read
        stages[f"answer_{search}"] = stages["text_encoder"] + workload.num_tokens * stages[f"step_{search}"]
        stages[f"end_to_end_{search}"] = stages["vision"] + stages[f"answer_{search}"]
    stages["second_task"] = stages["answer_greedy"]
    return stages
