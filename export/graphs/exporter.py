"""Exporting one torch module to one ONNX file through optimum, and comparing the file with the module.

optimum is built around whole transformers models: an `OnnxConfig` generates dummy inputs, a patcher changes the model
while it is traced, and a validation runs both sides. `export_graph` gives it a module with explicit example tensors
instead. That needs some care:

* optimum validates on the shapes that it traced with, which says nothing about the dynamic axes. Here it validates with
  another size of every dynamic axis, and in this process: by default it spawns one, which needs a `__main__` guard in
  the caller.
* While it exports and validates, optimum patches torch and transformers (masks without vmap, `use_cache` of every
  config). The errors in the report are therefore measured on the unpatched module.
* Its validation has one absolute tolerance for all outputs, whatever their scale. The errors are checked here, output
  by output; optimum's tolerance is then set to twice the measured error, so that it still checks names, shapes, axes
  and the patched model.
* torch folds the transpose of a `Linear` into a new initializer, so a tied embedding would be stored twice. `tidy`
  undoes this.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from optimum.exporters.error_utils import AtolError, OutputMatchError, ShapeError
from optimum.exporters.onnx import OnnxConfig, export_models, validate_models_outputs
from optimum.utils import NormalizedConfig
from optimum.utils import logging as optimum_logging
from transformers import PretrainedConfig

from florence_onnx.errors import VerificationError

from .comparison import DynamicAxes, OutputError, Tensors, compare, resized, worst
from .files import tidy


@dataclass(frozen=True)
class GraphReport:
    """The file that `export_graph` wrote, and its errors.

    Example: `GraphReport(path=Path("vision_encoder.onnx"), outputs={"image_features": OutputError(2.4e-06, 3.1e-07)})`
    """

    path: Path
    outputs: dict[str, OutputError]

    @property
    def max_abs(self) -> float:
        """Largest absolute difference of all outputs."""
        return max(error.max_abs for error in self.outputs.values())

    @property
    def max_rel(self) -> float:
        """Largest relative difference of all outputs."""
        return max(error.max_rel for error in self.outputs.values())


def export_graph(
    module: torch.nn.Module,
    path: Path,
    *,
    inputs: Tensors,
    outputs: Sequence[str],
    dynamic_axes: DynamicAxes,
    opset: int,
    atol: float = 1e-4,
    rtol: float = 1e-4,
    check_inputs: Sequence[Tensors] = (),
) -> GraphReport:
    """Exports a module and compares the file with it.

    Args:
        module: Called as `module(*inputs.values())`; returns one tensor, or a tuple in the order of `outputs`. In eval
            mode.
        path: The `.onnx` file to write; beyond 2 GB the weights go to `<path>_data` beside it.
        inputs: Example tensors by input name (dots are allowed), in call order. Axes with the same name have the same
            size. Use sizes of at least 2: torch traces a broadcast axis of size 1 as a constant.
        outputs: Output names.
        dynamic_axes: Input or output name -> axis -> axis name. Axes not named here are fixed.
        opset: ONNX operator set; torch's TorchScript exporter supports up to 20.
        atol: Absolute error that always passes.
        rtol: Bound on `OutputError.max_rel` for larger absolute errors. fp32 sums in another order differ by about 1e-6
            of the largest value, so an absolute bound alone would reject sound exports of models with large
            activations.
        check_inputs: More inputs to compare on, besides `resized(inputs, dynamic_axes)`. Needed where repeated content
            is no valid input.

    Returns:
        The largest errors over all input sets.

    Raises:
        VerificationError: The file does not reproduce the module within the bounds.
    """
    adapter = _NamedModule(module.eval(), tuple(inputs), tuple(outputs))
    config = _ExplicitConfig(inputs, outputs, dynamic_axes)
    models = {path.stem: (adapter, config)}
    with _quiet(), _kept_configs(module):
        export_models(models, output_dir=path.parent, output_names=[path.name], opset=opset)
        tidy(path)
    batches = [resized(inputs, dynamic_axes), *check_inputs]
    report = GraphReport(path, worst(compare(module, path, batch, outputs) for batch in batches))
    _check(report, atol, rtol)
    with _quiet(), _kept_configs(module):
        _validate(models, path, list(outputs), max(atol, 2 * report.max_abs))
    return report


class _NamedModule(torch.nn.Module):
    """Gives a module the signature that optimum needs: one parameter per input, and a dict of named outputs.

    The parameters are named `in_0`, `in_1`, …, since ONNX input names may have dots, and a parameter named
    `past_key_values` would be rewritten by optimum's patcher.
    """

    def __init__(self, module: torch.nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.module = module
        self.config = PretrainedConfig()

        def forward(*values: torch.Tensor, **named: torch.Tensor) -> dict[str, torch.Tensor]:
            result = module(*values, *named.values())
            return dict(zip(outputs, [result] if isinstance(result, torch.Tensor) else result, strict=True))

        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in _places(inputs)]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        setattr(self, "forward", forward)  # noqa: B010 - mypy forbids assigning a method


class _ExplicitConfig(OnnxConfig):  # type: ignore[misc]  # optimum is untyped
    """An `OnnxConfig` with explicit tensors and axes instead of generators of dummy inputs."""

    NORMALIZED_CONFIG_CLASS = NormalizedConfig

    def __init__(self, inputs: Tensors, outputs: Sequence[str], dynamic_axes: DynamicAxes) -> None:
        super().__init__(PretrainedConfig())
        self._tensors = inputs
        self._output_names = outputs
        self._axes = dynamic_axes

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return {name: dict(self._axes.get(name, {})) for name in self._tensors}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return {name: dict(self._axes.get(name, {})) for name in self._output_names}

    def ordered_inputs(self, model: torch.nn.Module) -> dict[str, dict[int, str]]:
        """Returns the inputs in their given order; optimum would sort them by the parameter names of `forward`."""
        return self.inputs

    def generate_dummy_inputs(self, framework: str = "pt", extra: int = 0, **_: object) -> dict[str, Any]:
        """Returns the example tensors; `extra` is passed through optimum's `input_shapes`, see `_validate`."""
        tensors = resized(self._tensors, self._axes, extra) if extra else dict(self._tensors)
        if framework == "np":
            return {name: value.numpy() for name, value in tensors.items()}
        return dict(zip(_places(tuple(tensors)), tensors.values(), strict=True))

    def generate_dummy_inputs_for_validation(
        self, reference_model_inputs: dict[str, Any], onnx_input_names: list[str]
    ) -> dict[str, Any]:
        """Maps parameter names to ONNX names, without the inputs that the graph dropped as unused."""
        named = dict(zip(self._tensors, reference_model_inputs.values(), strict=True))
        return {name: value for name, value in named.items() if name in onnx_input_names}


def _places(names: tuple[str, ...]) -> list[str]:
    return [f"in_{index}" for index in range(len(names))]


def _validate(models: dict[str, Any], path: Path, outputs: list[str], atol: float) -> None:
    try:
        validate_models_outputs(
            models,
            onnx_named_outputs=[outputs],
            output_dir=path.parent,
            onnx_files_subpaths=[path.name],
            atol=atol,
            input_shapes={"extra": 1},
            use_subprocess=False,
        )
    except (AtolError, OutputMatchError, ShapeError) as error:
        raise VerificationError(f"{path.name} does not reproduce the checkpoint: {error}") from error


def _check(report: GraphReport, atol: float, rtol: float) -> None:
    bad = {name: error for name, error in report.outputs.items() if not _is_close(error, atol, rtol)}
    if bad:
        text = ", ".join(f"{name}: abs {error.max_abs:.3g}, rel {error.max_rel:.3g}" for name, error in bad.items())
        raise VerificationError(
            f"{report.path.name} differs from torch beyond abs {atol:g} / rel {rtol:g} in {text}; "
            "this is a defect of the export, not of the checkpoint: please report it"
        )


def _is_close(error: OutputError, atol: float, rtol: float) -> bool:
    return error.max_abs <= atol or error.max_rel <= rtol


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences torch's tracer and deprecation warnings and optimum's log; what they warn of, the comparison checks."""
    level = optimum_logging.get_verbosity()
    optimum_logging.set_verbosity(50)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optimum_logging.set_verbosity(level)


@contextlib.contextmanager
def _kept_configs(module: torch.nn.Module) -> Iterator[None]:
    """Restores `use_cache` of the module's configs, which optimum's patcher sets to False and leaves so."""
    found: list[Any] = [getattr(child, "config", None) for child in module.modules()]
    configs = [config for config in found if hasattr(config, "use_cache")]
    before = [config.use_cache for config in configs]
    try:
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            config.use_cache = value
