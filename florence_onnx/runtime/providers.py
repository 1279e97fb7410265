"""Execution providers by device name: presets, what to install for each, and how options are merged.

A new execution provider is one more `Preset`. Options are merged in one order, later ones override: the preset's, the
caller's, then those that another argument requires (`precision="bf16"`).
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
"""Provider options by ONNX Runtime's names. A mapping as value is passed as JSON, as for OpenVINO's `load_config`."""
Provider = str | tuple[str, Options]
ProviderList = list[tuple[str, dict[str, Any]]]

BF16 = "bf16"
"""Name of the precision in which a provider computes fp32 files in bf16."""


@dataclass(frozen=True)
class Preset:
    """How ONNX Runtime runs graphs on a device."""

    provider: str
    """Name of the execution provider."""
    install: str
    """How to install it."""
    options: Options = field(default_factory=dict)
    """Default provider options."""
    threads_option: str = ""
    """Name of the provider option for the number of threads, if there is one."""
    precisions: tuple[str, ...] = ("fp16", "fp32")
    """Precisions in order of preference, if there are several bundles: int8 and int4 have kernels on the CPU only."""
    companions: tuple[str, ...] = ()
    """Devices whose providers take the nodes that this one does not support."""
    bf16: Options = field(default_factory=dict)
    """Provider options that compute fp32 files in bf16; empty where the provider cannot."""


PRESETS: dict[str, Preset] = {
    "cpu": Preset("CPUExecutionProvider", "pip install 'florence-onnx[cpu]'", precisions=PREFERRED_PRECISIONS),
    "cuda": Preset(
        "CUDAExecutionProvider",
        "pip install 'florence-onnx[gpu]' in an environment without the CPU package onnxruntime",
        {
            "cudnn_conv_algo_search": "HEURISTIC",
            # Sums of the fused layer normalisation in fp32: in fp16 their rounding is known to change beams.
            "enable_skip_layer_norm_strict_mode": "1",
            # By default each extension of the arena is rounded up to a power of two, which takes memory from others.
            "arena_extend_strategy": "kSameAsRequested",
        },
    ),
    "tensorrt": Preset(
        "TensorrtExecutionProvider",
        "pip install 'florence-onnx[gpu]' and TensorRT 10 (libnvinfer.so.10)",
        companions=("cuda",),
    ),
    # The hint f32 is needed: by default OpenVINO computes in bf16 on a CPU that has it, with other answers.
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
"""What `device="auto"` tries, in this order, where a bundle has no TensorRT engines for the GPU. OpenVINO precedes the
CPU, because its build of ONNX Runtime is only there if somebody chose it. It is not always better: on an AVX2 machine
its vision encoder took 1.1 times as long as the CPU provider's and its decode step as long, with 1.9 times the memory
(benchmarks/results/session_options.md)."""
AUTO_ORDER_BF16: tuple[str, ...] = ("openvino",)
"""The same for `precision="bf16"`, which only OpenVINO offers."""


def candidates(available: Sequence[str], precision: str | None = None) -> list[str]:
    """The devices that `device="auto"` tries, in order of preference; never empty.

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
    """Precisions in order of preference where none is asked for; arguments and errors as for `resolve`."""
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
        providers: Provider names, or pairs of name and options, in order of preference.
        available: The providers compiled into the installed onnxruntime.
        provider_options: Options of the device's provider; they override the preset's.
        precision: `"bf16"` to compute in bf16.
        num_threads: For providers with a thread pool of their own; None for the provider's default.

    Raises:
        InputError: The device name is unknown, `providers` is not a list of names or pairs, or arguments contradict.
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
            raise InputError(f"{argument} goes with device; where providers are given, put the options into that list")


def _forced(device: str, precision: str | None) -> Options:
    if precision != BF16:
        return {}
    if not PRESETS[device].bf16:
        offers = ", ".join(name for name, preset in PRESETS.items() if preset.bf16)
        raise ProviderError(f'device {device} has no precision bf16; use device="{offers}"')
    if not cpu.flags() & set(cpu.BF16_FLAGS):
        raise ProviderError(
            f"precision bf16 needs a CPU with {' or '.join(cpu.BF16_FLAGS)}; this one ({cpu.name()}) has neither, and "
            "OpenVINO would compute in fp32 without saying so: use precision fp32"
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
    fix = f"; to install it: {hints[0]}" if hints else ""
    raise ProviderError(f"{provider} is not in the installed onnxruntime, which has {', '.join(available)}{fix}")
