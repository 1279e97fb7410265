"""`florence-onnx bench-fal`, also `python -m benchmarks.serving.compare_fal`: compares fal and this package."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from florence_onnx.bundles.bundle import DEMO
from florence_onnx.commands.arguments import exit_on_error, parse_region
from florence_onnx.errors import InputError, MissingExtraError

if TYPE_CHECKING:  # these need the extra
    from florence_onnx.bench_fal.budget import Budget
    from florence_onnx.bench_fal.figures import Rates
    from florence_onnx.bench_fal.journal import Journal
    from florence_onnx.bench_fal.plan import Call
    from florence_onnx.bench_fal.rate_limit import Clock
    from florence_onnx.bench_fal.targets import ClientTarget, Target, TargetChoice

JOURNAL = "journal.jsonl"
_PACKAGES = {"fal_client": "fal-client", "rapidfuzz": "rapidfuzz"}
_GUESSED_SECONDS = 5.0
"""Seconds of a call to fal, for the estimate before the first measurement."""
_NO_KEY = "none"
"""Key for a server that requires none, and for fal if nothing will be sent."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(name="bench-fal")
def bench_fal(
    images: Annotated[list[str], typer.Argument(help="Paths, http(s) URLs or data: URIs.", metavar="IMAGE")],
    tasks: Annotated[
        str, typer.Option(help="Comma-separated slugs or tokens.", metavar="TASK,...")
    ] = "object-detection,ocr-with-region,caption",
    repeats: Annotated[int, typer.Option(help="Calls per question (image, task, text and region).", min=1)] = 3,
    targets: Annotated[
        str,
        typer.Option(
            help="Comma-separated: fal, in-process, or NAME=http://HOST:PORT (a server run with --cache-mb 0).",
            metavar="TARGET,...",
        ),
    ] = "in-process,fal",
    model: Annotated[
        str, typer.Option(help="For in-process: bundle directory, hub repository (owner/name), or demo.")
    ] = DEMO,
    precision: Annotated[
        str | None, typer.Option(help="For in-process: fp32, fp16, int8.  [default: best for the device]")
    ] = None,
    device: Annotated[str, typer.Option(help="For in-process: auto, cpu, cuda, tensorrt or openvino.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for journal and report; an existing journal is resumed.")] = Path(
        "bench-fal"
    ),
    max_calls: Annotated[
        int | None,
        typer.Option(help="Maximum requests to fal, over all runs with this --out. Required for fal.", min=0),
    ] = None,
    rate: Annotated[float, typer.Option(help="Maximum calls per minute to fal.", min=0.01)] = 30.0,
    timeout: Annotated[float, typer.Option(help="Seconds without a byte after which a call fails.", min=1)] = 300.0,
    text: Annotated[str | None, typer.Option(help="Text input, for tasks that need one.")] = None,
    region: Annotated[
        str | None,
        typer.Option(
            help="Region, for tasks that need one, in thousandths of width and height (0 to 999).",
            metavar="X1,Y1,X2,Y2",
        ),
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            help='JSON file: {"IMAGE or *": {"TASK or *": {"text_input": "…" or "region": [x1, y1, x2, y2]}}}.'
        ),
    ] = None,
    fal_rate: Annotated[float, typer.Option(help="Dollars per second of compute at fal.", min=0)] = 0.00125,
    own_rate: Annotated[float, typer.Option(help="Dollars per hour of this machine.", min=0)] = 0.50,
    is_confirmed: Annotated[
        bool, typer.Option("--yes", help="Send calls to fal without asking for confirmation.")
    ] = False,
    fal_url: Annotated[str, typer.Option(hidden=True, help="URL that replaces fal's, for tests.")] = "",
) -> None:
    """Make the same calls to fal and to this package, and compare times, prices and answers.

    Calls to fal cost money: they require FAL_KEY in the environment, --max-calls, and a confirmation. Every answer is
    written to OUT/journal.jsonl before the next call; to resume an interrupted comparison, run the same command again.

    The exit code is 1 if calls are left without an answer.
    """
    with exit_on_error():
        _require_extra()
        from florence_onnx.bench_fal.figures import Rates
        from florence_onnx.bench_fal.plan import Inputs, make_plan, read_inputs
        from florence_onnx.bench_fal.targets import FAL_URL, parse_targets

        given = Inputs(text, parse_region(region), read_inputs(inputs) if inputs else {})
        options = Options(
            plan=make_plan(images, tasks.split(","), given, repeats),
            chosen=parse_targets(targets),
            out=out,
            model=model,
            precision=precision,
            device=device,
            max_calls=max_calls,
            rate=rate,
            timeout=timeout,
            rates=Rates(fal_rate, own_rate),
            fal_url=fal_url or FAL_URL,
        )
        num_missing = compare(options, confirm=_print_and_agree if is_confirmed else _ask_user)
    if num_missing:
        raise typer.Exit(1)


@dataclass(frozen=True)
class Options:
    """The options of a comparison."""

    plan: Sequence[Call]
    chosen: Sequence[TargetChoice]
    out: Path
    model: str
    precision: str | None
    device: str
    max_calls: int | None
    rate: float
    """Most calls per minute to fal."""
    timeout: float
    """Seconds without a byte after which a call fails."""
    rates: Rates
    fal_url: str


def compare(options: Options, *, confirm: Callable[[str], bool], clock: Clock | None = None) -> int:
    """Makes the calls that have not ended and writes the report.

    Args:
        options: The options.
        confirm: Called with the estimated cost before anything is sent to fal; returns whether to send it.
        clock: Measures the times; the clock of this machine by default.

    Returns:
        The number of calls without an answer.

    Raises:
        InputError: The key, --max-calls or the confirmation is missing, or the journal cannot be used.
    """
    from florence_onnx.bench_fal.journal import Journal
    from florence_onnx.bench_fal.rate_limit import SystemClock
    from florence_onnx.bench_fal.runner import Runner
    from florence_onnx.bench_fal.targets import find_key, find_server_key, secrets_of

    clock = clock or SystemClock()
    secrets = [*secrets_of(find_key()), *secrets_of(find_server_key())]
    with Journal(options.out / JOURNAL, secrets=secrets) as journal:
        targets, fal, budget = _make_targets(options, journal, clock)
        if fal is not None:
            _confirm_cost(options, fal, journal, budget, confirm)
        runner = Runner(targets, journal, clock, lambda line: typer.echo(line, err=True))
        try:
            runner.run(options.plan)
        except KeyboardInterrupt:
            typer.echo("interrupted; run the same command again to resume", err=True)
        return _report(options, targets, journal, runner.stopped)


def _make_targets(options: Options, journal: Journal, clock: Clock) -> tuple[list[Target], ClientTarget | None, Budget]:
    """Creates all targets; returns them, the one that is fal, and its budget. Nothing is loaded or connected yet."""
    from florence_onnx.bench_fal.budget import Budget
    from florence_onnx.bench_fal.rate_limit import RateLimiter
    from florence_onnx.bench_fal.targets import FAL, FAL_URL, ClientTarget, InProcessTarget, find_key, find_server_key

    # without --max-calls nothing can be sent at all
    budget = Budget(options.max_calls or 0, journal, RateLimiter(options.rate, clock, journal.last_sent), clock)
    targets: list[Target] = []
    fal = None
    for chosen in options.chosen:
        if chosen.url is not None:
            targets.append(ClientTarget(chosen.name, chosen.url, find_server_key() or _NO_KEY, timeout=options.timeout))
        elif chosen.name == FAL:
            fal = ClientTarget(
                FAL,
                options.fal_url,
                find_key() or _NO_KEY,
                timeout=options.timeout,
                budget=budget,
                trust_env=options.fal_url == FAL_URL,
            )
            targets.append(fal)
        else:
            targets.append(InProcessTarget(options.model, device=options.device, precision=options.precision))
    return targets, fal, budget


def _confirm_cost(
    options: Options, fal: ClientTarget, journal: Journal, budget: Budget, confirm: Callable[[str], bool]
) -> None:
    """Checks key, limit and confirmation, if there are calls left to send to fal."""
    from florence_onnx.bench_fal.plan import NOT_AT_FAL
    from florence_onnx.bench_fal.runner import outstanding
    from florence_onnx.bench_fal.targets import require_key

    left = outstanding(options.plan, fal, journal)
    if not left:
        return
    if absent := {call.task.slug for call in left} & NOT_AT_FAL:
        raise InputError(
            f"fal has no endpoint for {', '.join(absent)}; leave it out of --tasks or fal out of --targets"
        )
    require_key()
    if options.max_calls is None:
        raise InputError(f"calls to fal cost money: pass --max-calls to limit them; {len(left)} calls are outstanding")
    num_calls = min(len(left), budget.num_left)
    if num_calls and not confirm(_estimate(options, fal, journal, num_calls, len(left))):
        raise InputError("nothing was sent: calls to fal need a confirmation (or --yes)")


def _estimate(options: Options, fal: ClientTarget, journal: Journal, num_calls: int, num_left: int) -> str:
    found = [journal.find(call, fal.identity) for call in options.plan]
    known = [each.seconds for each in found if each is not None and each.error is None]
    seconds = sum(known) / len(known) if known else _GUESSED_SECONDS
    price = num_calls * seconds * options.rates.fal
    return (
        f"{num_calls} of {num_left} outstanding calls will be sent to fal ({journal.num_sent} were sent before, "
        f"--max-calls {options.max_calls}): about ${price:.3f} at ${options.rates.fal:g} per second and {seconds:.1f} s per call "
        f"({'measured' if known else 'a guess'}), at most one every {60 / options.rate:.1f} s."
    )


def _print_and_agree(question: str) -> bool:
    typer.echo(question, err=True)
    return True


def _ask_user(question: str) -> bool:
    typer.echo(question, err=True)
    return sys.stdin.isatty() and typer.confirm("Send them?", err=True)


def _report(options: Options, targets: Sequence[Target], journal: Journal, stopped: dict[str, str]) -> int:
    from florence_onnx.bench_fal import figures, report

    timing = figures.timing_rows(options.plan, targets, journal, options.rates)
    found = [(target.name, journal.find(call, target.identity)) for target in targets for call in options.plan]
    result = report.Result(
        settings={
            "images": list(dict.fromkeys(call.image.name for call in options.plan)),
            "tasks": list(dict.fromkeys(call.task.slug for call in options.plan)),
            "repeats": 1 + max(call.repeat for call in options.plan),
            "targets": {target.name: target.identity for target in targets},
            "max_calls": options.max_calls,
            "calls_per_minute": options.rate,
        },
        rates=options.rates,
        timing=timing,
        agreement=figures.agreement_rows(options.plan, targets, journal),
        errors=[(name, each) for name, each in found if each is not None and each.error is not None],
        stopped=stopped,
        num_sent=journal.num_sent,
        num_missing=sum(each is None or each.error is not None for _, each in found),
    )
    report.write(result, options.out)
    report.print_to(Console(width=None if sys.stdout.isatty() else 240, highlight=False), result)
    typer.echo(f"journal and report: {options.out}", err=True)
    return result.num_missing


def _require_extra() -> None:
    for module, package in _PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(package, "fal")
