"""TensorRT engines: their targets and folders, building them, and that TensorRT's parser accepts every graph."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from florence_onnx import Florence2, InputError, ProviderError, loading
from florence_onnx.bundles import bundle
from florence_onnx.inference.decoder import FIRST_CAPACITY
from florence_onnx.inference.decoder_call import TEXT_LENGTHS
from florence_onnx.runtime import cuda, engine, tensorrt
from florence_onnx.runtime.cuda import Gpu
from florence_onnx.runtime.load_options import LoadOptions
from florence_onnx.runtime.sessions import SINGLE_CUDA_GRAPH
from florence_onnx.runtime.tensorrt import Target

pytest.importorskip("onnxruntime", reason="pip install 'florence-onnx[cpu]'")

DEMO = bundle.read(bundle.DEMO_DIRECTORY)
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 85_520_809_984)
TARGET = Target(H100, "10.13.3", "1.31.1")
RTX_BUNDLES = os.environ.get("FLORENCE_ONNX_TEST_ENGINES", str(bundle.DEMO_DIRECTORY)).split(os.pathsep)
"""Bundles of which engines are built in these tests, separated as in PATH."""


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bundle.Bundle:
    """A copy of the demo bundle in a writable folder, with a temporary folder as the cache of engines."""
    monkeypatch.setenv(tensorrt.ENVIRONMENT_VARIABLE, str(tmp_path / "cache"))
    return bundle.read(Path(shutil.copytree(bundle.DEMO_DIRECTORY, tmp_path / "bundle")))


def pretend(graphs: Mapping[str, Path], options: Mapping[str, Mapping[str, str]]) -> None:
    """Builds nothing, and writes the context models that ONNX Runtime's provider would."""
    for graph in graphs:
        Path(options[graph]["trt_ep_context_file_path"]).write_text(graph)


def pretend_target(ort: Any, max_batch: int, provider_options: Mapping[str, object] | None = None) -> Target:
    """The target on a machine with an H100."""
    return replace(TARGET, max_batch=max_batch, options=tensorrt.engine_options(provider_options))


# ------------------------------------------------------------------------------------------------ targets and folders


def test_a_folder_is_named_by_what_its_engines_are_for() -> None:
    name = TARGET.folder(DEMO)
    assert name.startswith("nvidia-h100-80gb-hbm3-sm90-trt10.13.3-ort1.31.1-fp16-b8-")
    assert len(name.rpartition("-")[2]) == 12
    assert "/" not in name


@pytest.mark.parametrize(
    "other",
    [
        replace(TARGET, gpu=replace(H100, name="NVIDIA L4", compute_capability=(8, 9))),
        replace(TARGET, gpu=replace(H100, compute_capability=(8, 7))),
        replace(TARGET, tensorrt="10.13.2"),
        replace(TARGET, onnxruntime="1.31.2"),
        replace(TARGET, max_batch=16),
        replace(TARGET, options=(("trt_builder_optimization_level", "5"),)),
    ],
    ids=["gpu", "capability", "tensorrt", "onnxruntime", "batch", "options"],
)
def test_every_change_of_the_target_leads_to_another_folder(other: Target, copy: bundle.Bundle) -> None:
    assert other.folder(copy) != TARGET.folder(copy)
    tensorrt.build(copy, TARGET, pretend)
    assert tensorrt.find(copy, TARGET) is not None
    assert tensorrt.find(copy, other) is None


def test_another_export_to_the_same_bundle_leads_to_another_folder(copy: bundle.Bundle) -> None:
    tensorrt.build(copy, TARGET, pretend)
    path = copy.path / bundle.DESCRIPTION
    described = json.loads(path.read_text())
    described["files"]["decoder.onnx"]["sha256"] = "0" * 64
    path.write_text(json.dumps(described))
    assert tensorrt.find(copy, TARGET) is None


def test_engines_for_a_larger_batch_are_found(copy: bundle.Bundle) -> None:
    for batch in (4, 16):
        tensorrt.build(copy, replace(TARGET, max_batch=batch), pretend)
    for wanted, found in ((1, 16), (4, 16), (16, 16), (17, None)):
        engines = tensorrt.find(copy, replace(TARGET, max_batch=wanted))
        assert (engines.max_batch if engines else None) == found


def test_other_build_options_of_another_release_lead_to_another_folder(
    copy: bundle.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt.build(copy, TARGET, pretend)
    options = tensorrt.build_options
    monkeypatch.setattr(tensorrt, "build_options", lambda *given: {**options(*given), "trt_bf16_enable": "1"})
    assert tensorrt.find(copy, TARGET) is None


def test_options_that_do_not_change_what_is_built_need_no_other_engines() -> None:
    given = {"device_id": 1, "trt_context_memory_sharing_enable": 1, "trt_max_workspace_size": 1 << 30}
    assert tensorrt.engine_options(given) == (("trt_max_workspace_size", "1073741824"),)


def test_device_id_chooses_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    monkeypatch.setattr(cuda, "find_gpu", lambda index: replace(H100, name=f"GPU {index}"))
    monkeypatch.setattr(cuda, "diagnose", lambda version: [])
    monkeypatch.setattr(cuda, "diagnose_tensorrt", lambda ort: [])
    assert tensorrt.target(onnxruntime, 1, {"device_id": "3"}).gpu.name == "GPU 3"
    assert tensorrt.target(onnxruntime, 1).gpu.name == "GPU 0"
    with pytest.raises(InputError, match="device_id must be the number of a GPU, got 'first'"):
        tensorrt.target(onnxruntime, 1, {"device_id": "first"})


def test_a_layout_without_engines_is_an_error_beside_engines_of_another(copy: bundle.Bundle, tmp_path: Path) -> None:
    (tmp_path / "cache" / TARGET.folder(copy)).mkdir(parents=True)
    with pytest.raises(ProviderError, match=r"layout of transformers\.js"):
        tensorrt.find(replace(copy, path=tmp_path / "elsewhere", layout="transformers.js"), TARGET)


# ------------------------------------------------------------------------------------------------------------ building


def test_engines_are_found_when_all_are_built(copy: bundle.Bundle, caplog: pytest.LogCaptureFixture) -> None:
    engines = tensorrt.build(copy, TARGET, pretend)
    assert engines.folder.parent == copy.path / "engines"
    assert engines == tensorrt.find(copy, TARGET)
    assert {path.name for path in engines.graphs(copy).values()} == {
        *("vision_encoder_ctx.onnx", "text_encoder_ctx.onnx", "decoder_top_ctx.onnx")
    }
    assert "this takes minutes" in caplog.text
    assert "engines built in" in caplog.text


def test_engines_are_readable_by_all_users(copy: bundle.Bundle) -> None:
    assert tensorrt.build(copy, TARGET, pretend).folder.stat().st_mode & 0o777 == 0o755


def test_engines_that_cannot_be_read_are_not_found(
    copy: bundle.Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engines = tensorrt.build(copy, TARGET, pretend)
    is_file = Path.is_file

    def refuse(path: Path) -> bool:
        if path.parent == engines.folder:
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)
    assert tensorrt.find(copy, TARGET) is None
    assert "cannot be read" in caplog.text


def test_the_slower_of_two_builds_keeps_the_engines_of_the_faster(copy: bundle.Bundle) -> None:
    made = []

    def build_as_the_faster_one_ends(graphs: Mapping[str, Path], options: Mapping[str, Mapping[str, str]]) -> None:
        pretend(graphs, options)
        faster = tensorrt.build(copy, TARGET, pretend)
        made.append((faster, faster.folder.stat().st_ino))

    engines = tensorrt.build(copy, TARGET, build_as_the_faster_one_ends)
    assert (engines, engines.folder.stat().st_ino) == made[0]
    assert [path.name for path in engines.folder.parent.iterdir()] == [engines.folder.name]


def test_engines_that_lack_a_file_are_replaced(copy: bundle.Bundle) -> None:
    engines = tensorrt.build(copy, TARGET, pretend)
    engines.graphs(copy)[bundle.DECODER_TOP].unlink()
    assert tensorrt.find(copy, TARGET) is None
    tensorrt.build(copy, TARGET, pretend)
    assert tensorrt.find(copy, TARGET) == engines


def test_a_failed_build_leaves_nothing(copy: bundle.Bundle) -> None:
    def fail(graphs: Mapping[str, Path], options: Mapping[str, Mapping[str, str]]) -> None:
        pretend({bundle.VISION_ENCODER: graphs[bundle.VISION_ENCODER]}, options)
        raise ProviderError("TensorRT refuses")

    with pytest.raises(ProviderError, match="TensorRT refuses"):
        tensorrt.build(copy, TARGET, fail)
    assert list((copy.path / "engines").iterdir()) == []


def test_a_graph_without_an_engine_is_an_error(copy: bundle.Bundle) -> None:
    def forget(graphs: Mapping[str, Path], options: Mapping[str, Mapping[str, str]]) -> None:
        pretend({name: path for name, path in graphs.items() if name != bundle.DECODER_TOP}, options)

    with pytest.raises(ProviderError, match=r"no engine of decoder_top\.onnx"):
        tensorrt.build(copy, TARGET, forget)
    assert tensorrt.find(copy, TARGET) is None


def test_engines_go_to_the_cache_where_the_bundle_is_not_writable(
    copy: bundle.Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: copy.path not in Path(path).parents)
    engines = tensorrt.build(copy, TARGET, pretend)
    assert engines.folder.parent == tmp_path / "cache"
    assert tensorrt.find(copy, TARGET) == engines


def test_without_a_writable_folder_the_error_names_the_environment_variable(
    copy: bundle.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ProviderError, match="FLORENCE_ONNX_ENGINE_CACHE"):
        tensorrt.build(copy, TARGET, pretend)


@pytest.mark.parametrize("change", [{"precision": "int8"}, {"layout": "transformers.js"}])
def test_bundles_that_cannot_have_engines(change: dict[str, Any]) -> None:
    with pytest.raises(ProviderError, match="export it with --precision fp16"):
        tensorrt.graphs(replace(DEMO, **change))


def test_engines_are_opened_one_after_the_other_with_their_options(
    copy: bundle.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[str, dict[str, Any]]] = []

    def open_engine(path: Path, options: LoadOptions) -> None:
        provider_options = dict(options.provider_options or {})
        opened.append((path.name, provider_options))
        Path(provider_options["trt_ep_context_file_path"]).touch()

    monkeypatch.setattr(tensorrt, "target", pretend_target)
    monkeypatch.setattr(loading, "OnnxEngine", open_engine)
    engines = loading.build_engines(copy, 4, LoadOptions(provider_options={"trt_builder_optimization_level": 5}))
    assert engines.max_batch == 4
    assert [name for name, _ in opened] == [bundle.VISION_ENCODER, bundle.TEXT_ENCODER, bundle.DECODER_TOP]
    assert {options["trt_builder_optimization_level"] for _, options in opened} == {5}
    assert tensorrt.find(copy, replace(TARGET, max_batch=4)) is None, "these were built at another optimization level"


def test_options_in_a_list_of_providers_reach_the_build(copy: bundle.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    opened: list[dict[str, Any]] = []

    def open_engine(path: Path, options: LoadOptions) -> None:
        provider_options = dict(options.provider_options or {})
        opened.append(provider_options)
        Path(provider_options["trt_ep_context_file_path"]).touch()

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    monkeypatch.setattr(tensorrt, "target", pretend_target)
    monkeypatch.setattr(loading, "OnnxEngine", open_engine)
    loading.build_engines(copy, 1, LoadOptions(providers=[("TensorrtExecutionProvider", {"device_id": 2})]))
    assert {options["device_id"] for options in opened} == {2}


# ------------------------------------------------------------------------------------------------- shapes and options


def test_profiles_cover_the_shapes_of_the_runtime() -> None:
    """Every padded length of a prompt, every likely cache capacity, every number of images."""
    found = tensorrt.profiles(DEMO, 8)
    sizes = DEMO.sizes
    longest = sizes.max_positions - sizes.num_image_tokens
    for kinds in found.values():
        for name, least in kinds["min"].items():
            usual, most = kinds["opt"][name], kinds["max"][name]
            assert all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True)), name
    text = [kind["input_ids"] for kind in found[bundle.TEXT_ENCODER].values()]
    assert text == [(1, TEXT_LENGTHS[0]), (1, TEXT_LENGTHS[0]), (1, longest)]
    decoder = found[bundle.DECODER_TOP]
    assert decoder["min"]["visible"] == (1, 1, FIRST_CAPACITY)
    assert decoder["max"]["visible"] == (8, tensorrt.MAX_TOKENS, 4096)
    assert decoder["max"]["encoder_attention_mask"] == (8, sizes.max_positions)
    assert found[bundle.VISION_ENCODER]["max"]["pixel_values"] == (8, 3, 128, 128)


def test_profiles_have_every_input_of_every_graph() -> None:
    model = Florence2.from_pretrained("demo", device="cpu", max_batch=1)
    text = model._text_model
    engines = (model._vision_encoder, text._text_encoder, text._decoder)  # type: ignore[attr-defined]
    for graph, loaded in zip(tensorrt.graphs(DEMO), engines, strict=True):
        assert set(tensorrt.profiles(DEMO, 1)[graph]["max"]) == set(loaded.inputs)


def test_options_of_a_build(tmp_path: Path) -> None:
    options = tensorrt.build_options(DEMO, bundle.TEXT_ENCODER, tmp_path, 8)
    assert options["trt_fp16_enable"] == "1"
    assert options["trt_profile_max_shapes"] == "input_ids:1x959,attention_mask:1x959,image_features:1x65x128"
    assert options["trt_ep_context_file_path"] == str(tmp_path / "text_encoder_ctx.onnx")
    assert "trt_engine_cache_path" not in options, (
        "the provider does not accept an absolute path beside a context model"
    )
    assert (
        tensorrt.build_options(replace(DEMO, precision="fp32"), bundle.TEXT_ENCODER, tmp_path, 8)["trt_fp16_enable"]
        == "0"
    )


def test_the_installed_provider_knows_the_options(tmp_path: Path) -> None:
    import onnxruntime

    provider = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    if not provider.is_file():
        pytest.skip("the installed onnxruntime has no TensorRT provider: pip install '.[gpu]' instead")
    content = provider.read_bytes()
    options = tensorrt.build_options(DEMO, bundle.TEXT_ENCODER, tmp_path, 8)
    assert [name for name in (*options, SINGLE_CUDA_GRAPH) if name.encode() not in content] == []
    assert cuda._tensorrt_libraries(onnxruntime) == ("libnvinfer.so.10", "libnvonnxparser.so.10")


def test_the_installed_provider_of_tensorrt_knows_no_graph_ids() -> None:
    """Why it may not capture CUDA graphs.

    When this fails, ONNX Runtime has learnt to read the ids, and `SINGLE_CUDA_GRAPH` can move to `CUDA_GRAPHS`.
    """
    import onnxruntime

    folder = Path(onnxruntime.__file__).parent / "capi"
    contents = {}
    for name in ("cuda", "tensorrt"):
        provider = folder / f"libonnxruntime_providers_{name}.so"
        if not provider.is_file():
            pytest.skip("the installed onnxruntime has no TensorRT provider: pip install '.[gpu]' instead")
        contents[name] = provider.read_bytes()
    # only eight bytes: compilers inline short strings in pieces of that size
    assert {name: b"gpu_grap" in content for name, content in contents.items()} == {"cuda": True, "tensorrt": False}


@pytest.mark.parametrize("value", [1, "1", True])
@pytest.mark.parametrize("as_list", [False, True])
def test_one_cuda_graph_for_all_bindings_is_refused(value: Any, as_list: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    name = "TensorrtExecutionProvider"
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [name])
    options = {SINGLE_CUDA_GRAPH: value}
    asked: dict[str, Any] = (
        {"providers": [(name, options)]} if as_list else {"device": "tensorrt", "provider_options": options}
    )
    with pytest.raises(InputError, match="keeps one CUDA graph a session"):
        engine.OnnxEngine(DEMO.graph(bundle.TEXT_ENCODER), LoadOptions(**asked))


def test_sessions_of_tensorrt_are_opened_without_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    opened: list[Any] = []

    def open_session(ort: Any, path: Path, chosen: Any, overrides: Any, kept: Any) -> Any:
        opened.extend(chosen)
        raise ProviderError("no GPU")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    monkeypatch.setattr(engine, "open_session", open_session)
    with pytest.raises(ProviderError, match="no GPU"):
        engine.OnnxEngine(DEMO.graph(bundle.TEXT_ENCODER), LoadOptions("tensorrt"), cuda_graphs=True)
    assert opened == [("TensorrtExecutionProvider", {})]


# ------------------------------------------------------------------------------------------------------- device = auto


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices that `auto` tries on a machine whose onnxruntime has TensorRT and CUDA, and where neither starts."""
    devices: list[str] = []

    def load(read: bundle.Bundle, options: LoadOptions) -> Any:
        devices.append(options.device)
        raise ProviderError("no GPU") if len(devices) < 3 and options.device != "cpu" else StopIteration

    import onnxruntime

    providers = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(tensorrt, "target", pretend_target)
    monkeypatch.setattr(loading, "_load", load)
    return devices


def test_auto_tries_tensorrt_first_where_there_are_engines(
    copy: bundle.Bundle, tried: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    tensorrt.build(copy, TARGET, pretend)
    with pytest.raises(StopIteration):
        Florence2.from_bundle(copy)
    assert tried == ["tensorrt", "cuda", "cpu"]
    assert "device auto: tensorrt is installed but cannot run: no GPU" in caplog.text


def test_auto_does_not_try_tensorrt_through_the_host(copy: bundle.Bundle, tried: list[str]) -> None:
    tensorrt.build(copy, TARGET, pretend)
    with pytest.raises(StopIteration):
        Florence2.from_bundle(copy, LoadOptions(max_batch=0))
    assert tried == ["cuda", "cpu"]


def test_tensorrt_through_the_host_is_refused(copy: bundle.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    with pytest.raises(InputError, match='use device="cuda"'):
        Florence2.from_bundle(copy, LoadOptions(device="tensorrt", max_batch=0))


def test_auto_does_not_build_engines(copy: bundle.Bundle, tried: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(StopIteration):
        Florence2.from_bundle(copy)
    assert tried == ["cuda", "cpu"]
    assert "no TensorRT engines for this GPU; build them with: florence-onnx build-engines" in caplog.text


# ----------------------------------------------------------------------------- the parser and builder, without a GPU


@pytest.fixture(scope="module")
def engines() -> dict[str, dict[str, Any]]:
    """Facts about the engines that TensorRT for RTX built, in a process for each bundle, by bundle and graph."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT's parser and builder, which need no GPU: pip install tensorrt-rtx")
    found = {}
    for folder in RTX_BUNDLES:
        command = [sys.executable, "-m", "tests.cuda.rtx_engines", folder]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr
        found[folder] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("folder", RTX_BUNDLES, ids=lambda folder: f"{Path(folder).parent.name}/{Path(folder).name}")
def test_tensorrt_builds_an_engine_of_every_graph(engines: dict[str, dict[str, Any]], folder: str) -> None:
    read = bundle.read(Path(folder))
    sizes = read.sizes
    built = engines[folder]
    assert set(built) == {bundle.VISION_ENCODER, bundle.TEXT_ENCODER, bundle.DECODER_TOP}
    for graph, made in built.items():
        assert made["bytes"] > 10_000
        for name, shapes in made["profile"].items():
            asked = tensorrt.profiles(read, 2)[graph]
            assert shapes == [list(asked[kind][name]) for kind in ("min", "opt", "max")]
    assert built[bundle.VISION_ENCODER]["outputs"] == {"image_features": [-1, sizes.num_image_tokens, sizes.width]}
    outputs = built[bundle.DECODER_TOP]["outputs"]
    count = min(32, sizes.vocab_size)
    assert outputs["top_ids"] == outputs["top_values"] == [-1, -1, count]
    assert outputs["log_sums"] == [-1, -1]
    assert outputs["logits"] == [-1, -1, sizes.vocab_size]
    assert outputs["present.0.key"] == [-1, sizes.decoder_heads, -1, sizes.head_dim]
    assert sum(name.startswith("present.") for name in outputs) == 2 * sizes.decoder_layers
