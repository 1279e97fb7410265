"""`florence-onnx serve`: turns the options into settings and starts the server."""

from __future__ import annotations

import ssl
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from florence_onnx.bundles.bundle import DEMO
from florence_onnx.commands.arguments import (
    CalibrationOption,
    DeviceOption,
    FitOption,
    GenerationOption,
    ImageSizeOption,
    ModelOption,
    PrecisionOption,
    exit_on_error,
    parse_assignments,
    parse_size,
)
from florence_onnx.errors import InputError, MissingExtraError
from florence_onnx.fal.service import ServiceSettings
from florence_onnx.generation.option_names import parse_options
from florence_onnx.images.placement import check_fit
from florence_onnx.model import Florence2
from florence_onnx.server.settings import Images, ServerSettings, default_limits

# the import that fails is not always that of the package itself
_PACKAGES = ("fastapi", "uvicorn", "h11", "prometheus_client", "pythonjsonlogger", "starlette", "anyio")
_LOG_FORMATS = ("json", "text")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(name="serve")
def serve(
    model: ModelOption = DEMO,
    precision: PrecisionOption = None,
    device: DeviceOption = "auto",
    image_size: ImageSizeOption = None,
    fit: FitOption = "stretch",
    calibration: CalibrationOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. The default can only be reached from this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(help="Key that clients must send as `Authorization: Key …`.", envvar="FLORENCE_ONNX_API_KEY"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Batches in flight, all on the same model.  [default: 4 on a GPU, 1 otherwise]", min=1),
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Maximum requests in a batch.", min=1)] = 8,
    max_waiting: Annotated[
        int, typer.Option(help="Maximum waiting requests; further ones get status 429.", min=1)
    ] = 256,
    accepted_mb: Annotated[
        int,
        typer.Option(help="MiB of requests that are not answered yet; further ones get status 429.", min=1),
    ] = 512,
    cache_mb: Annotated[
        int, typer.Option(help="MiB of image features to cache for further requests; 0 disables the cache.", min=0)
    ] = 256,
    image_mb: Annotated[
        int, typer.Option(help="MiB for decoded images of the requests in flight; further requests wait.", min=64)
    ] = 1024,
    images: Annotated[str, typer.Option(help="Annotated images in results: url, data (a data: URI) or none.")] = "url",
    public_url: Annotated[
        str | None, typer.Option(help="URL of the server as clients see it, if it is behind a proxy.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Origin whose web pages may call the server (CORS); repeatable.")
    ] = None,
    trusted_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name by which clients reach the server, *.example.com, or * for any; all other values of the Host "
            "header are refused; repeatable.  [default: any with --api-key; otherwise addresses and local names]"
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="HOST[:PORT] in a private network that images may be downloaded from; repeatable."),
    ] = None,
    option: GenerationOption = None,
    allow_options: Annotated[
        bool, typer.Option("--allow-options", help="Accept generation options as further fields of requests.")
    ] = False,
    certificate: Annotated[str | None, typer.Option(help="PEM file with the certificate, for https.")] = None,
    private_key: Annotated[str | None, typer.Option(help="PEM file with the private key of the certificate.")] = None,
    grace: Annotated[
        float,
        typer.Option(
            help="Seconds after SIGTERM, SIGINT or SIGHUP in which results of the queue can still be fetched."
        ),
    ] = 30.0,
    max_connections: Annotated[
        int, typer.Option(help="Maximum open connections; further ones get status 503.", min=1)
    ] = 512,
    header_timeout: Annotated[float, typer.Option(help="Seconds for the headers of a request.")] = 20.0,
    body_timeout: Annotated[
        float, typer.Option(help="Seconds over which the rate of a body is measured, again and again.")
    ] = 10.0,
    min_body_rate: Annotated[
        float, typer.Option(help="Least bytes per second of a body; slower ones get 408.")
    ] = 1024.0,
    idle_timeout: Annotated[
        float, typer.Option(help="Seconds for which a connection is kept between requests, or unread.")
    ] = 65.0,
    log_format: Annotated[str, typer.Option(help="Format of the log: json or text.")] = "json",
) -> None:
    """Serve fal's API and a web page to try it."""
    with exit_on_error():
        limits = replace(default_limits(), allowed_hosts=tuple(allow_host or ()))
        settings = ServerSettings(
            host=host,
            port=port,
            api_key=api_key,
            # the page shows it to everybody, so never a whole path
            model_name=Path(model).resolve().name if Path(model).is_dir() else model,
            images=_choose("--images", images, get_args(Images)),
            public_url=public_url,
            origins=tuple(allow_origin or ()),
            trusted_hosts=tuple(trusted_host or ()),
            service=ServiceSettings(
                image_limits=limits,
                workers=workers,
                max_batch=max_batch,
                max_waiting=max_waiting,
                max_accepted_bytes=accepted_mb * 2**20,
                feature_cache_bytes=cache_mb * 2**20,
                max_decoded_bytes=image_mb * 2**20,
                options=parse_options(parse_assignments(option or ())),
                allow_options=allow_options,
            ),
            grace_seconds=grace,
            max_connections=max_connections,
            header_seconds=header_timeout,
            body_seconds=body_timeout,
            min_body_rate=min_body_rate,
            idle_seconds=idle_timeout,
            certificate=certificate,
            private_key=private_key,
        )
        chosen_format = _choose("--log-format", log_format, _LOG_FORMATS)
        bind, run = _import_serve()
        check_certificate(settings)
        listeners = bind(host, port)  # before the model is loaded, which may take minutes
        _warn(settings, model)
        florence = Florence2.from_pretrained(
            model,
            device=device,
            precision=precision,
            image_size=parse_size(image_size),
            fit=check_fit(fit),
            calibration=calibration,
        )
        florence.warm_up()
        scheme = "https" if certificate else "http"
        port = listeners[0].getsockname()[1]
        address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/"
        _print(f"serving {model} on {address} (Ctrl-C finishes the accepted requests and exits)")
        run(florence, settings, chosen_format, listeners)


def _choose(option: str, value: str, known: Sequence[str]) -> Any:
    if value not in known:
        raise InputError(f"{option} must be one of {', '.join(known)}, got {value!r}")
    return value


def _import_serve() -> tuple[Callable[..., Any], Callable[..., None]]:
    """`bind` and `serve`."""
    try:
        from florence_onnx.server.listener import bind
        from florence_onnx.server.serve import serve
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES:
            raise
        raise MissingExtraError(package, "serve") from None
    return bind, serve


def check_certificate(settings: ServerSettings) -> None:
    """Raises InputError if TLS cannot be served with a certificate and its key."""
    if settings.certificate is None:
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(settings.certificate, settings.private_key)
    except OSError as error:  # ssl.SSLError is one
        reason = error.strerror or error
        raise InputError(
            f"cannot use the certificate {settings.certificate} with the key {settings.private_key}: {reason}"
        ) from None


def _warn(settings: ServerSettings, model: str) -> None:
    if settings.is_open:
        names = ", ".join(settings.trusted_hosts) or "any address or local name of this machine"
        _print_framed(
            f"WARNING: no key: anyone who can reach {settings.host} can use this server.",
            "Pass --api-key, or set FLORENCE_ONNX_API_KEY, to require one.",
            f"Requests are accepted for {names}; --trusted-host changes that.",
        )
    if model == DEMO:
        _print("the demo model only knows drawn shapes and words; for photographs, pass --model")


def _print_framed(*lines: str) -> None:
    frame = "*" * (max(map(len, lines)) + 4)
    _print("\n".join((frame, *(f"* {line}" for line in lines), frame)))


def _print(message: str) -> None:
    sys.stderr.write(f"{message}\n")
