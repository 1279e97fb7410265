"""Execution providers by device name: presets, what to install for each, and how options are merged.

A new execution provider is one more `Preset`. Options are merged by one rule: the preset's, then the caller's, then what
was asked for by another argument (`precision="bf16"`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from florence_onnx.bundles.bundle import PREFERRED_PRECISIONS
from florence_onnx.errors import InputError, ProviderError
from florence_onnx.runtime import cpu

Device = Literal["auto", "cpu", "cuda", "tensorrt", "openvino"]
Options = Mapping[str, Any]
"""Provider options by their own names. A mapping as value is handed over as JSON, the form of OpenVINO's `load_config`."""
Provider = str | tuple[str, Options]
ProviderList = list[tuple[str, dict[str, Any]]]

BF16 = "bf16"
"""The precision of fp32 files computed in bf16 by the provider."""


@dataclass(frozen=True)
class Preset:
    """How a device is reached through ONNX Runtime."""

    provider: str
    """Name of the execution provider."""
    install: str
    """What brings it."""
    options: Options = field(default_factory=dict)
    """Provider options unless the caller gives others."""
    threads_option: str = ""
    """The option that takes the number of threads, where there is one."""
    precisions: tuple[str, ...] = ("fp16", "fp32")
    """Which bundle of several is taken unless the caller says, best first: integers have kernels on the CPU provider only."""
    companions: tuple[str, ...] = ()
    """Devices whose provider takes the nodes that this one leaves."""
    bf16: Options = field(default_factory=dict)
    """Provider options that make fp32 files run in bf16; empty where that is not offered."""


PRESETS: dict[str, Preset] = {
    "cpu": Preset("CPUExecutionProvider", "pip install 'florence-onnx[cpu]'", precisions=PREFERRED_PRECISIONS),
    "cuda": Preset(
        "CUDAExecutionProvider",
        "pip install 'florence-onnx[gpu]' in an environment without the CPU package onnxruntime",
        {
            "cudnn_conv_algo_search": "HEURISTIC",
            # sums of the fused normalisation in fp32: in fp16 they are known to turn beams
            "enable_skip_layer_norm_strict_mode": "1",
            # no power of two more than is asked for, of a memory that others want too
            "arena_extend_strategy": "kSameAsRequested",
        },
    ),
    "tensorrt": Preset(
        "TensorrtExecutionProvider",
        "pip install 'florence-onnx[gpu]' and TensorRT 10 (libnvinfer.so.10)",
        companions=("cuda",),
    ),
    # The hint f32 is no default of OpenVINO's: where the processor has bf16 it would take that and answer otherwise.
    "openvino": Preset(
        "OpenVINOExecutionProvider",
        "pip install 'florence-onnx[openvino]' in an environment without the package onnxruntime",
        {"device_type": "CPU", "load_config": {"CPU": {"INFERENCE_PRECISION_HINT": "f32"}}},
        threads_option="num_of_threads",
        bf16={"load_config": {"CPU": {"INFERENCE_PRECISION_HINT": "bf16"}}},
        precisions=("fp32", "fp16"),
    ),
}
"""By device name."""

AUTO_ORDER: tuple[str, ...] = ("cuda", "openvino", "cpu")
"""What `device="auto"` tries, best first, where a bundle has no TensorRT engines for the card. Who installs ONNX Runtime's build for
OpenVINO wants that; on an AVX2 machine its vision encoder took 1.1 times the CPU provider's time, its decode step the same, and it
needed 1.9 times the memory (benchmarks/results/session_options.md): there `device="cpu"` or the package onnxruntime is better."""
AUTO_ORDER_BF16: tuple[str, ...] = ("openvino",)
"""The same for bf16, which is where OpenVINO is worth its memory."""


def candidates(available: Sequence[str], precision: str | None = None) -> list[str]:
    """The devices that `device="auto"` may choose from, best first; never empty.

    Args:
        available: The providers compiled into the installed onnxruntime.
        precision: `"bf16"`, or any other.
    """
    order = AUTO_ORDER_BF16 if precision == BF16 else AUTO_ORDER
    *accelerators, last = order
    return [*(name for name in accelerators if PRESETS[name].provider in available), last]


def preferred_precisions(
    device: str, providers: Sequence[Provider] | None, available: Sequence[str]
) -> tuple[str, ...]:
    """Which bundle of several is taken where no precision is asked for, best first; arguments and errors as for `resolve`."""
    provider = resolve(device, providers, available)[0][0]
    found = (preset.precisions for preset in PRESETS.values() if preset.provider == provider)
    return next(found, PRESETS["cpu"].precisions)


def resolve(
    device: str,
    providers: Sequence[Provider] | None,
    available: Sequence[str],
    *,
    provider_options: Options | None = None,
    precision: str | None = None,
    num_threads: int | None = None,
) -> ProviderList:
    """Turns a device name or an explicit provider list into what `InferenceSession` takes.

    Args:
        device: One of `Device`; ignored when `providers` is given.
        providers: Provider names, or pairs of name and options, first choice first.
        available: The providers compiled into the installed onnxruntime.
        provider_options: Options of the device's provider, over the preset's.
        precision: `"bf16"` asks the provider to compute in it.
        num_threads: For providers with threads of their own; None leaves it to them.

    Raises:
        InputError: The device name is unknown, `providers` is no list of names or pairs, or arguments contradict.
        ProviderError: The provider is not part of the installed onnxruntime, or cannot compute in that precision here.
    """
    if providers is not None:
        _refuse_beside_providers(provider_options, precision)
        return _explicit(providers, available)
    if device not in get_args(Device):
        raise InputError(f"unknown device {device!r}; choose one of {', '.join(get_args(Device))}")
    if provider_options is not None and not isinstance(provider_options, Mapping):
        raise InputError(f'provider_options must be a dict such as {{"num_of_threads": 2}}, got {provider_options!r}')
    if device == "auto":
        device = candidates(available, precision)[0]
    preset = PRESETS[device]
    _require(preset.provider, available)
    forced = _forced(device, precision)
    threads = {preset.threads_option: num_threads} if preset.threads_option and num_threads else {}
    chain: list[tuple[str, Options]] = [
        (preset.provider, {**preset.options, **threads, **(provider_options or {}), **forced}),
        *((PRESETS[name].provider, PRESETS[name].options) for name in preset.companions),
    ]
    return [(name, _as_text(options)) for name, options in chain if name in available]


def _refuse_beside_providers(provider_options: Options | None, precision: str | None) -> None:
    for argument, is_given in (("provider_options", provider_options), ('precision="bf16"', precision == BF16)):
        if is_given:
            raise InputError(f"{argument} goes with device; with providers, put the options into that list")


def _forced(device: str, precision: str | None) -> Options:
    if precision != BF16:
        return {}
    if not PRESETS[device].bf16:
        offers = ", ".join(name for name, preset in PRESETS.items() if preset.bf16)
        raise ProviderError(f'device {device} has no precision bf16; it is offered by device="{offers}"')
    if not cpu.flags() & set(cpu.BF16_FLAGS):
        raise ProviderError(
            f"precision bf16 needs a processor with {' or '.join(cpu.BF16_FLAGS)}; this one ({cpu.name()}) has "
            "neither, and OpenVINO would compute in fp32 without saying so: use precision fp32"
        )
    return PRESETS[device].bf16


def _as_text(options: Options) -> dict[str, Any]:
    return {name: json.dumps(value) if isinstance(value, Mapping) else value for name, value in options.items()}


def _explicit(providers: Sequence[Provider], available: Sequence[str]) -> ProviderList:
    if isinstance(providers, str) or not providers:
        raise InputError(f'providers must be a list such as ["CPUExecutionProvider"], got {providers!r}')
    pairs: ProviderList = []
    for entry in providers:
        try:
            name, options = (entry, {}) if isinstance(entry, str) else entry
            pairs.append((str(name), _as_text(dict(options))))
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
