"""`florence-onnx mcp`: the tasks as tools of an MCP server over standard input and output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from florence_onnx.bundles import hub
from florence_onnx.bundles.bundle import DEMO
from florence_onnx.commands.arguments import DeviceOption, ModelOption, PrecisionOption, exit_on_error
from florence_onnx.errors import BundleNotFoundError, MissingExtraError
from florence_onnx.model import Florence2
from florence_onnx.runtime.providers import BF16
from florence_onnx.tasks import Task


def mcp(
    model: ModelOption = DEMO,
    precision: PrecisionOption = None,
    device: DeviceOption = "auto",
    root: Annotated[
        list[Path] | None, typer.Option(help="Folder whose image files may be read; repeatable. Default: all files.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="HOST[:PORT] that URLs may lead to though it is not public; repeatable.")
    ] = None,
) -> None:
    """Serve the tasks as MCP tools over standard input and output; needs the extra `mcp`."""
    with exit_on_error():
        make_server, images = _import_tools()

        def load() -> Florence2:
            florence = Florence2.from_pretrained(model, device=device, precision=precision)
            florence.warm_up()
            return florence

        make_server(load, images(root or (), allow_host or ()), _own_tasks(model, precision)).run("stdio")


def _own_tasks(model: str, precision: str | None) -> Mapping[str, Task[Any]]:
    """The tasks that the bundle carries. A client asks for the tools before a model is downloaded: none then."""
    try:
        return hub.resolve(model, precision=None if precision == BF16 else precision, local_only=True).tasks
    except BundleNotFoundError:
        return {}


def _import_tools() -> tuple[Callable[..., Any], Callable[..., Any]]:
    try:
        from florence_onnx.mcp_server.tools import Images, make_server
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("mcp", "mcp_types", "pydantic"):
            raise
        raise MissingExtraError("mcp", "mcp") from None
    return make_server, Images
