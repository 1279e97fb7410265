"""`florence-onnx serve`: from the command line's words to a running server."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from florence_onnx.bundles.bundle import DEMO
from florence_onnx.commands.arguments import GenerationOption, exit_on_error, parse_assignments
from florence_onnx.errors import InputError, MissingExtraError
from florence_onnx.fal.service import ServiceSettings
from florence_onnx.generation.option_names import parse_options
from florence_onnx.model import Florence2
from florence_onnx.server.settings import Images, ServerSettings, default_limits

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "pythonjsonlogger", "starlette", "anyio")
_LOG_FORMATS = ("json", "text")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(name="serve")
def serve(
    model: Annotated[str, typer.Option(help="Bundle directory, hub repository (owner/name), or demo.")] = DEMO,
    precision: Annotated[str | None, typer.Option(help="Which files to take where a model has several.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    host: Annotated[
        str, typer.Option(help="Address to listen on; by default only this machine reaches it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes any that is free.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(help="What clients must send as Authorization: Key …", envvar="FLORENCE_ONNX_API_KEY")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Batches at a time, in this process, with one model. Default: 4 on a card, else 1.", min=1),
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Waiting requests that run together.", min=1)] = 8,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; more get 429.", min=1)] = 256,
    cache_mb: Annotated[
        int, typer.Option(help="MiB of encoded images to keep for further questions; 0 keeps none.", min=0)
    ] = 256,
    images: Annotated[str, typer.Option(help="Annotated images in answers: url, data or none.")] = "url",
    public_url: Annotated[str | None, typer.Option(help="How clients reach the server, behind a proxy.")] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Web pages of this origin may call; repeatable.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="HOST[:PORT] that images may come from though it is not public; repeatable."),
    ] = None,
    option: GenerationOption = None,
    allow_options: Annotated[
        bool, typer.Option("--allow-options", help="Requests may state generation options, as more fields.")
    ] = False,
    certificate: Annotated[str | None, typer.Option(help="PEM file, for https.")] = None,
    private_key: Annotated[str | None, typer.Option(help="Its key.")] = None,
    grace: Annotated[float, typer.Option(help="Seconds after SIGTERM in which results can still be fetched.")] = 30.0,
    log_format: Annotated[str, typer.Option(help="json or text.")] = "json",
) -> None:
    """Serve fal's API, and a page to try it."""
    with exit_on_error():
        limits = replace(default_limits(), allowed_hosts=tuple(allow_host or ()))
        settings = ServerSettings(
            host=host,
            port=port,
            api_key=api_key,
            model_name=Path(model).resolve().name if Path(model).is_dir() else model,  # strangers need no path of ours
            images=_choose("--images", images, get_args(Images)),
            public_url=public_url,
            origins=tuple(allow_origin or ()),
            service=ServiceSettings(
                image_limits=limits,
                workers=workers,
                max_batch=max_batch,
                max_waiting=max_waiting,
                feature_cache_bytes=cache_mb * 2**20,
                options=parse_options(parse_assignments(option or ())),
                allow_options=allow_options,
            ),
            grace_seconds=grace,
            certificate=certificate,
            private_key=private_key,
        )
        chosen_format = _choose("--log-format", log_format, _LOG_FORMATS)
        run = _import_serve()
        _warn(settings, model)
        florence = Florence2.from_pretrained(model, device=device, precision=precision)
        florence.warm_up()
        scheme = "https" if certificate else "http"
        address = f"{scheme}://{host}:{port}/" if port else "a free port of " + host
        _say(f"serving {model} on {address} (Ctrl-C finishes what was accepted and ends)")
        run(florence, settings, chosen_format)


def _choose(option: str, value: str, known: Sequence[str]) -> Any:
    if value not in known:
        raise InputError(f"{option} must be one of {', '.join(known)}, got {value!r}")
    return value


def _import_serve() -> Callable[..., None]:
    try:
        from florence_onnx.server.serve import serve
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES:
            raise
        raise MissingExtraError(package, "serve") from None
    return serve


def _warn(settings: ServerSettings, model: str) -> None:
    if not settings.is_loopback and settings.api_key is None:
        _say(f"everybody who reaches {settings.host} can use this server: pass --api-key to keep strangers out")
    if model == DEMO:
        _say("the demo model knows drawn shapes and words only; for photographs, pass --model")


def _say(message: str) -> None:
    sys.stderr.write(f"{message}\n")
