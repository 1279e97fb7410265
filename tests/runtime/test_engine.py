"""Sessions: options that reach ONNX Runtime, errors of providers that cannot run, and OpenVINO if it is installed."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from florence_onnx import (
    BundleFileMissingError,
    BundleFormatError,
    Florence2,
    GenerationOptions,
    InputError,
    ProviderError,
    tasks,
)
from florence_onnx.bundles import bundle
from florence_onnx.runtime import cpu, cuda, engine, providers, sessions
from florence_onnx.runtime.load_options import LoadOptions

DEMO = bundle.DEMO_DIRECTORY
SAMPLE = DEMO.parent / "samples" / "scene-1.png"
OPENVINO = "OpenVINOExecutionProvider"
CUDA = "CUDAExecutionProvider"
ALL = [OPENVINO, "CPUExecutionProvider"]
HINT = "INFERENCE_PRECISION_HINT"


def has(provider: str) -> bool:
    import onnxruntime

    return provider in onnxruntime.get_available_providers()


needs_openvino = pytest.mark.skipif(
    not has(OPENVINO), reason="the installed onnxruntime has no OpenVINO: pip install onnxruntime-openvino instead"
)


def fp32_demo() -> bundle.Bundle:
    """The demo bundle described as fp32, for checks that come before graphs are loaded."""
    return replace(bundle.read(DEMO), precision="fp32")


@pytest.fixture
def with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "flags", lambda: frozenset({"avx2", "amx_bf16"}))


@pytest.fixture
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "flags", lambda: frozenset({"avx2"}))


# ------------------------------------------------------------------------------------------------- provider options


def test_provider_options_are_merged_defaults_then_users_then_forced(with_bf16: None) -> None:
    given = {"num_of_threads": 3, "cache_dir": "blobs", "load_config": {"CPU": {HINT: "f16"}}}
    ((name, options),) = providers.resolve("openvino", None, [OPENVINO], provider_options=given, num_threads=8)
    assert name == OPENVINO
    assert options["device_type"] == "CPU"
    assert options["num_of_threads"] == 3
    assert options["cache_dir"] == "blobs"
    assert json.loads(options["load_config"]) == {"CPU": {HINT: "f16"}}
    ((_, forced),) = providers.resolve("openvino", None, [OPENVINO], provider_options=given, precision="bf16")
    assert json.loads(forced["load_config"]) == {"CPU": {HINT: "bf16"}}


def test_openvino_computes_in_fp32_unless_asked_otherwise() -> None:
    ((_, options),) = providers.resolve(
        "openvino", None, ALL, num_threads=2
    )  # the CPU provider is not listed behind it
    assert json.loads(options["load_config"]) == {"CPU": {HINT: "f32"}}
    assert options["num_of_threads"] == 2


def test_bf16_on_a_cpu_without_it_is_refused(without_bf16: None) -> None:
    with pytest.raises(ProviderError, match="avx512_bf16 or amx_bf16"):
        providers.resolve("openvino", None, ALL, precision="bf16")


def test_bf16_on_a_provider_without_it_names_one_that_has_it() -> None:
    with pytest.raises(ProviderError, match='device cpu has no precision bf16; use device="openvino"'):
        Florence2.from_bundle(fp32_demo(), LoadOptions(device="cpu", precision="bf16"))


def test_bf16_needs_fp32_files() -> None:
    described = bundle.read(DEMO)
    quantized = replace(described, precision="int8")
    with pytest.raises(BundleFormatError, match="has precision int8, not bf16"):
        Florence2.from_bundle(quantized, LoadOptions(device="openvino", precision="bf16"))
    with pytest.raises(BundleFormatError, match="fp32"):
        Florence2.from_pretrained("demo", precision="bf16")  # its files are fp16


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"providers": ["CPUExecutionProvider"], "provider_options": {"x": 1}}, "provider_options goes with device"),
        ({"providers": ["CPUExecutionProvider"], "precision": "bf16"}, "bf16.* goes with device"),
        ({"provider_options": {"x": 1}}, "needs a device by name"),
        ({"device": "cpu", "provider_options": 3}, "provider_options must be a dict"),
    ],
)
def test_options_that_contradict_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Florence2.from_bundle(fp32_demo(), LoadOptions(**arguments))


# -------------------------------------------------------------------------------------------------- session options


def session_of(model: Florence2) -> Any:
    return model._vision_encoder._session  # type: ignore[attr-defined]


def test_threads_are_the_cores_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "num_cores", lambda: 1)
    options = session_of(Florence2.from_pretrained("demo", device="cpu")).get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.enable_mem_pattern is False
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_session_options_of_the_caller_override_the_defaults() -> None:
    given = {"intra_op_num_threads": 2, "session.intra_op.allow_spinning": 0, "enable_mem_pattern": True}
    options = session_of(Florence2.from_pretrained("demo", device="cpu", session_options=given)).get_session_options()
    assert options.intra_op_num_threads == 2
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.enable_mem_pattern is True


def test_graphs_loaded_together_come_back_in_order() -> None:
    graphs = bundle.read(DEMO).stages()
    names = [bundle.KEY_INPUTS[name] for name in graphs]
    engines = engine.load_engines(list(graphs.values()), names, LoadOptions("cpu"))
    assert [set(wanted) <= set(loaded.inputs) for wanted, loaded in zip(names, engines, strict=True)] == [True] * 3
    assert engines[0].outputs == ["image_features"]


def test_the_first_graph_that_does_not_load_is_named(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(DEMO, tmp_path / "bundle"))
    graphs = bundle.read(copy).stages()
    (copy / bundle.TEXT_ENCODER).unlink()
    (copy / bundle.DECODER).unlink()
    with pytest.raises(BundleFileMissingError, match=bundle.TEXT_ENCODER):
        engine.load_engines(list(graphs.values()), [()] * 3, LoadOptions("cpu"))


# --------------------------------------------------------------------------------------------------------- OpenVINO


@pytest.fixture(scope="module")
def openvino() -> Florence2:
    return Florence2.from_pretrained("demo", device="openvino")


@pytest.fixture(scope="module")
def plain() -> Florence2:
    return Florence2.from_pretrained("demo", device="cpu")


@needs_openvino
@pytest.mark.parametrize("num_beams", [1, 3])
def test_openvino_gives_the_answers_of_the_cpu(openvino: Florence2, plain: Florence2, num_beams: int) -> None:
    assert openvino.info()["provider"] == OPENVINO
    options = GenerationOptions(num_beams=num_beams)
    same = []
    for sample in sorted(SAMPLE.parent.glob("*.png"))[:3]:
        for task in (tasks.OBJECT_DETECTION, tasks.CAPTION):
            answers = [model.run(task, sample, options=options).token_ids for model in (plain, openvino)]
            same.append(answers[0] == answers[1])
            scores = [model.score_tokens(task, sample, answers[0]) for model in (plain, openvino)]
            np.testing.assert_allclose(scores[1], scores[0], atol=0.02 * np.abs(scores[0]).max())
    # the demo model is fp16, which OpenVINO computes in fp32: where two bins are equally likely, the answers may differ
    assert sum(same) >= len(same) - 1


@needs_openvino
def test_openvino_reads_and_writes_caches_in_place(openvino: Florence2, plain: Florence2) -> None:
    """Logits of 100 forced tokens, during which the cache is updated in place and grows once.

    The demo's files are fp16. The CPU provider rounds to fp16 between nodes and OpenVINO does not, hence the tolerance;
    a cache that lost a token would differ by far more.
    """
    answer = plain.run(tasks.OCR_WITH_REGION, SAMPLE, options=GenerationOptions(num_beams=1, min_new_tokens=99))
    scores = [model.score_tokens(tasks.OCR_WITH_REGION, SAMPLE, answer.token_ids[:100]) for model in (plain, openvino)]
    assert len(scores[0]) == 99
    assert np.abs(scores[0] - scores[1]).max() < 0.02 * np.abs(scores[0]).max()


@needs_openvino
def test_openvino_answers_batches_of_changing_size(openvino: Florence2) -> None:
    alone = [openvino.run(task, SAMPLE).token_ids for task in ("<OD>", "<CAPTION>", "<OCR>")]
    together = openvino.run_batch(["<OD>", "<CAPTION>", "<OCR>"], [SAMPLE] * 3)
    assert [each.token_ids for each in together] == alone


@needs_openvino
def test_nodes_that_openvino_does_not_take_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "florence_onnx"):
        loaded = engine.OnnxEngine(DEMO / bundle.DECODER, LoadOptions("openvino"))
    assert loaded.nodes[OPENVINO] > 100
    assert (sum(loaded.nodes.values()) > loaded.nodes[OPENVINO]) == ("leaves" in caplog.text)


def test_nodes_that_a_provider_does_not_take_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "florence_onnx"):
        sessions.report_nodes(Path("decoder.onnx"), OPENVINO, {OPENVINO: 300, "CPUExecutionProvider": 2})
    assert "decoder.onnx: OpenVINOExecutionProvider takes 300 nodes and leaves 2 to CPUExecutionProvider" in caplog.text


@needs_openvino
@pytest.mark.parametrize("options", [{"no_such_option": 1}, {"num_of_threads": "x"}, {"device_type": "GPU.7"}])
def test_an_option_that_openvino_refuses_is_an_error_not_the_cpu(options: dict[str, Any]) -> None:
    with pytest.raises(ProviderError):
        Florence2.from_pretrained("demo", device="openvino", provider_options=options)


@needs_openvino
def test_bf16_runs_where_the_cpu_has_it() -> None:
    if cpu.flags() & set(cpu.BF16_FLAGS):
        assert Florence2.from_bundle(fp32_demo(), LoadOptions(precision="bf16")).info()["precision"] == "bf16"
    else:
        with pytest.raises(ProviderError, match="needs a CPU with"):
            Florence2.from_bundle(fp32_demo(), LoadOptions(precision="bf16"))


# ------------------------------------------------------------------------------------------------------------- CUDA


class Driver:
    """The functions of libcuda that are used, on a machine whose driver supports CUDA 12.8."""

    def __init__(self, status: int = 0, gpus: int = 1) -> None:
        self.status, self.gpus = status, gpus

    def cuInit(self, flags: int) -> int:  # noqa: N802 - the driver's own name
        return self.status

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802 - the driver's own name
        version._obj.value = 12080
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802 - the driver's own name
        count._obj.value = self.gpus
        return 0


def machine(driver: Driver | None = None, *libraries: str) -> cuda.Load:
    """A loader that finds these libraries and no others."""

    def load(name: str) -> Any:
        if name == cuda.DRIVER and driver is not None:
            return driver
        if name not in libraries:
            raise OSError(f"{name}: cannot open shared object file")
        return name

    return load


CUDA_12 = ("libcudart.so.12", "libcublas.so.12", "libcublasLt.so.12")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="libraries are looked for by their names on Linux")


@on_linux
@pytest.mark.parametrize(
    ("load", "version", "said"),
    [
        (machine(Driver(), *CUDA_12, cuda.CUDNN), "12.8", []),
        (machine(), "", ["no NVIDIA driver", "no cuDNN 9"]),
        (machine(None, *CUDA_12, cuda.CUDNN), "12.8", ["no NVIDIA driver"]),
        (machine(Driver(), *CUDA_12), "12.8", ["no cuDNN 9"]),
        (
            machine(Driver(), "libcudart.so.13", cuda.CUDNN),
            "13.0",
            ["for CUDA 13, and libcublas.so.13", "it supports up to CUDA 12"],
        ),
        (machine(Driver(status=100), *CUDA_12, cuda.CUDNN), "12.8", ["cuInit returned 100"]),
        (machine(Driver(gpus=0), *CUDA_12, cuda.CUDNN), "12.8", ["sees no GPU"]),
    ],
)
def test_problems_of_cuda_are_named(load: cuda.Load, version: str, said: list[str]) -> None:
    found = cuda.diagnose(version, load)
    assert len(found) == len(said)
    assert all(part in problem for part, problem in zip(said, found, strict=True))


def test_cuda_without_its_package_names_what_to_install() -> None:
    if has(CUDA):
        pytest.skip("the installed onnxruntime has CUDA")
    with pytest.raises(ProviderError, match=r"CUDAExecutionProvider is not in .*pip install 'florence-onnx\[gpu\]'"):
        Florence2.from_pretrained("demo", device="cuda")


@on_linux
@pytest.mark.skipif(not has(CUDA), reason="the installed onnxruntime has no CUDA: pip install '.[gpu]' instead")
@pytest.mark.parametrize(
    "asked", [{"device": "cuda"}, {"device": "tensorrt"}, {"providers": [CUDA, "CPUExecutionProvider"]}]
)
def test_cuda_without_a_gpu_is_an_error_that_names_what_is_missing(asked: dict[str, Any]) -> None:
    if not cuda.diagnose(""):
        pytest.skip("this machine has a GPU, or its libraries")
    with pytest.raises(ProviderError, match=r"(no NVIDIA driver|driver does not start|sees no GPU|not found)"):
        Florence2.from_pretrained("demo", **asked)


@pytest.mark.parametrize("max_batch", [0, 2])
def test_sessions_are_freed_with_their_model(max_batch: int) -> None:
    """A reference cycle would keep the memory of a model, on a device too, until Python's collector comes by."""
    model = Florence2.from_pretrained("demo", device="cpu", max_batch=max_batch)
    model.run(tasks.CAPTION, Image.new("RGB", (32, 32)))
    gc.collect()
    gc.disable()
    try:
        alive = weakref.WeakSet(each for each in gc.get_objects() if isinstance(each, engine.OnnxEngine))
        kept = len(alive) - 3
        del model
        end = time.monotonic() + 20
        while len(alive) > kept and time.monotonic() < end:  # the device thread ends by itself
            time.sleep(0.02)
        assert len(alive) == kept
    finally:
        gc.enable()
