"""Execution providers by device name: presets, what to install for each, and how options are merged.

A new execution provider is one more `Preset`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from florence_onnx.errors import InputError, ProviderError

Device = Literal["auto", "cpu", "cuda", "tensorrt", "openvino"]
Provider = str | tuple[str, Mapping[str, Any]]
ProviderList = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Preset:
    """How a device is reached through ONNX Runtime."""

    provider: str
    """Name of the execution provider."""
    install: str
    """What brings it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Provider options unless the caller gives others."""
    companions: tuple[str, ...] = ()
    """Devices whose provider takes the nodes that this one leaves."""


PRESETS: dict[str, Preset] = {
    "cpu": Preset("CPUExecutionProvider", "pip install 'florence-onnx[cpu]'"),
    "cuda": Preset(
        "CUDAExecutionProvider",
        "pip install 'florence-onnx[gpu]' in an environment without the CPU package onnxruntime",
        {"cudnn_conv_algo_search": "HEURISTIC"},
    ),
    "tensorrt": Preset(
        "TensorrtExecutionProvider",
        "pip install 'florence-onnx[gpu]' and TensorRT 10 (libnvinfer.so.10)",
        companions=("cuda",),
    ),
    "openvino": Preset(
        "OpenVINOExecutionProvider",
        "pip install onnxruntime-openvino in an environment without the package onnxruntime",
    ),
}
"""By device name."""

AUTO_ORDER: tuple[str, ...] = ("cuda", "openvino", "cpu")
"""What `device="auto"` tries, best first."""


def candidates(available: Sequence[str]) -> list[str]:
    """The devices that `device="auto"` may choose from, best first; the last is always the CPU."""
    return [name for name in AUTO_ORDER if name == "cpu" or PRESETS[name].provider in available]


def resolve(device: str, providers: Sequence[Provider] | None, available: Sequence[str]) -> ProviderList:
    """Turns a device name or an explicit provider list into what `InferenceSession` takes.

    Args:
        device: One of `Device`; ignored when `providers` is given.
        providers: Provider names, or pairs of name and options, first choice first.
        available: The providers compiled into the installed onnxruntime.

    Raises:
        InputError: The device name is unknown, or `providers` is no list of names or pairs.
        ProviderError: The provider is not part of the installed onnxruntime.
    """
    if providers is not None:
        return _explicit(providers, available)
    if device not in get_args(Device):
        raise InputError(f"unknown device {device!r}; choose one of {', '.join(get_args(Device))}")
    if device == "auto":
        device = candidates(available)[0]
    preset = PRESETS[device]
    _require(preset.provider, available)
    chain = [preset, *(PRESETS[name] for name in preset.companions)]
    return [(each.provider, dict(each.options)) for each in chain if each.provider in available]


def _explicit(providers: Sequence[Provider], available: Sequence[str]) -> ProviderList:
    if isinstance(providers, str) or not providers:
        raise InputError(f'providers must be a list such as ["CPUExecutionProvider"], got {providers!r}')
    pairs: ProviderList = []
    for entry in providers:
        try:
            name, options = (entry, {}) if isinstance(entry, str) else entry
            pairs.append((str(name), dict(options)))
        except (TypeError, ValueError) as error:
            raise InputError(f"a provider is a name, or a name and a dict of options; got {entry!r}") from error
        _require(str(name), available)
    return pairs


def _require(provider: str, available: Sequence[str]) -> None:
    if provider in available:
        return
    hints = [preset.install for preset in PRESETS.values() if preset.provider == provider]
    fix = f"; it comes with: {hints[0]}" if hints else ""
    raise ProviderError(f"{provider} is not in the installed onnxruntime, which offers {', '.join(available)}{fix}")
