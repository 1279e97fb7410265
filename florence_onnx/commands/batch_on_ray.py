"""Options of `florence-onnx batch` for a cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from florence_onnx.batch.job import Job, Summary

ENGINES = ("local", "ray")
EngineOption = Annotated[
    str, typer.Option(help="local: this computer. ray: a Ray cluster, into OUT.parquet; needs the extra ray.")
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        help="Of the Ray cluster: HOST:PORT, or auto.  [default: a new one on this computer]",
        metavar="ADDRESS",
        show_default=False,
    ),
]
ActorsOption = Annotated[
    str, typer.Option(help="Processes on the Ray cluster, each with a model: N, or LEAST-MOST.", metavar="N")
]
ActorCpusOption = Annotated[float, typer.Option(help="CPUs of each of them, and threads of its model.", min=0)]
ActorGpusOption = Annotated[float, typer.Option(help="GPUs of each of them; a fraction shares one.", min=0)]


def run_on_ray(job: Job, address: str | None, actors: str, num_cpus: float, num_gpus: float) -> Summary:
    """Runs a job on a cluster, with Ray's own progress; errors as for `florence_onnx.ray.run`."""
    from florence_onnx.ray import Actors, run

    return run(job, actors=Actors(parse_actors(actors), num_cpus, num_gpus), address=address)


def parse_actors(given: str) -> int | tuple[int, int]:
    """Reads `8` or `2-8`.

    Raises:
        typer.BadParameter: It is something else.
    """
    low, dash, high = given.partition("-")
    if not all(part.isascii() and part.isdigit() for part in ([low, high] if dash else [low])):
        raise typer.BadParameter(f"must be N or LEAST-MOST, such as 8 or 2-8; got {given!r}", param_hint="--actors")
    return (int(low), int(high)) if dash else int(low)
