"""What the package promises as a whole: public names, who imports whom, and that PyTorch is never needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import florence_onnx

PACKAGE = Path(florence_onnx.__file__).parent

PUBLIC = [
    "BoundingBox",
    "BoundingBoxes",
    "BundleError",
    "BundleFileMissingError",
    "BundleFormatError",
    "BundleNotFoundError",
    "CheckpointError",
    "CorruptGraphError",
    "EncodedImage",
    "Florence2",
    "FlorenceError",
    "GenerationOptions",
    "Image",
    "ImageDecodeError",
    "ImageDownloadError",
    "ImageError",
    "ImageNotFoundError",
    "ImageTooLargeError",
    "InputError",
    "DeviceMemoryError",
    "MissingExtraError",
    "OCRBoundingBox",
    "OCRBoundingBoxSingle",
    "OptionsError",
    "Point",
    "Polygon",
    "PolygonOutput",
    "Prediction",
    "ProviderError",
    "Region",
    "RegionError",
    "TextInputError",
    "UnknownTaskError",
    "VerificationError",
    "__version__",
    "tasks",
]

MAY_IMPORT = {
    "_version": set(),
    "errors": set(),
    "results": set(),
    "url": {"errors"},
    "addresses": set(),
    "connection": {"addresses"},
    "download": {"addresses", "connection", "errors", "url"},
    "locations": {"errors", "results", "numpy"},
    "matching": {"results", "numpy", "PIL"},
    "postprocess": {"locations", "results", "tasks"},  # tasks for names only, inside a function
    "tasks": {"errors", "locations", "postprocess", "results"},
    "image": {"download", "errors", "url", "numpy", "PIL"},
    "draw": {"errors", "results", "PIL"},
    "prediction": {"device_memory", "draw", "errors", "results", "tasks", "numpy", "PIL"},
    "tokenizer": {"errors", "numpy", "tokenizers"},
    "options": {"errors", "numpy"},
    "scores": {"numpy"},
    "search": {"options", "scores", "numpy"},
    "logits_processors": {"options"},
    "prompt_lookup": set(),
    "greedy_search": {"logits_processors", "options", "prompt_lookup", "scores", "search", "numpy"},
    "beam_search": {"logits_processors", "options", "scores", "search", "numpy"},
    "generation": {"beam_search", "greedy_search", "options", "scores", "search"},
    "cpu": set(),
    "cuda": set(),
    "tensorrt": {"bundle", "cuda", "errors", "memory"},
    "cuda_memory": {"device_memory", "errors"},
    "memory": {"bundle"},
    "device_memory": {"numpy"},
    "graph_cache": {"cpu", "errors"},
    "providers": {"bundle", "cpu", "errors"},
    "sessions": {"cpu", "cuda", "errors", "graph_cache", "memory", "providers", "onnxruntime"},
    "engine": {"cpu", "cuda_memory", "device_memory", "errors", "memory", "providers", "sessions", "numpy"},
    "decoder": {"engine", "generation", "numpy"},
    "prompt_rows": {"numpy"},
    "decoder_call": {"bundle", "decoder", "device_memory", "engine", "prompt_rows", "scores", "numpy"},
    "resident_decoder": {
        "bundle",
        "decoder_call",
        "device_memory",
        "engine",
        "errors",
        "prompt_rows",
        "scores",
        "numpy",
    },
    "continuous_batching": {"decoder_call", "device_memory", "errors", "prompt_rows", "scores", "search"},
    "resident_model": {
        *("continuous_batching", "cuda_memory", "decoder_call", "device_memory", "engine", "errors", "memory"),
        *("resident_decoder", "search", "numpy"),
    },
    "transformers_js": {"decoder", "engine", "generation", "numpy"},
    "bundle": {"errors", "options"},
    "loading": {
        *("bundle", "cuda", "decoder", "decoder_call", "engine", "errors", "providers", "resident_model"),
        *("sessions", "tensorrt", "tokenizer", "transformers_js", "numpy"),
    },
    "workers": {"cpu"},
    "answering": {
        *("bundle", "decoder", "engine", "errors", "generation", "image", "options", "prediction", "search"),
        *("numpy", "PIL"),
    },
    "device_answering": {
        *("answering", "bundle", "continuous_batching", "device_memory", "errors", "image", "memory", "options"),
        *("prediction", "resident_model", "search", "workers", "PIL"),
    },
    "hub": {"bundle", "errors", "huggingface_hub"},
}
"""Every module below `model`, which is the only composer; `cli` and `__main__` stand above it."""


def imports(path: Path) -> set[str]:
    """What a module imports: its siblings by their own names, everything else by the top-level package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: absolute imports only"
            names = [alias.name for alias in node.names] if node.module == "florence_onnx" else [""]
            found |= {f"{node.module}.{name}".rstrip(".") for name in names}
    own = {name.split(".")[1] for name in found if name.startswith("florence_onnx.")}
    others = {name.split(".")[0] for name in found if not name.startswith("florence_onnx")}
    return own | {name for name in others if name not in sys.stdlib_module_names}


def test_public_names_are_exact() -> None:
    assert sorted(florence_onnx.__all__) == sorted(PUBLIC)
    assert all(hasattr(florence_onnx, name) for name in PUBLIC)


def test_every_error_is_public_and_documented() -> None:
    from florence_onnx import errors

    names = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert names <= set(PUBLIC)
    assert all(name in (errors.__doc__ or "") for name in names)


@pytest.mark.parametrize("name", sorted(MAY_IMPORT))
def test_modules_import_only_what_lies_below_them(name: str) -> None:
    assert imports(PACKAGE / f"{name}.py") <= MAY_IMPORT[name]


def test_every_module_has_a_place_in_the_order() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert modules == set(MAY_IMPORT) | {"__init__", "__main__", "model", "cli"}


def test_the_runtime_never_imports_the_export() -> None:
    for path in (*PACKAGE.glob("*.py"), *PACKAGE.glob("bench_fal/*.py")):
        assert not imports(path) & {"export", "torch", "transformers", "optimum", "onnx"}, path.name


def test_only_the_command_line_knows_the_server_and_the_comparison_with_fal() -> None:
    knowing = {path.stem for path in PACKAGE.glob("*.py") if imports(path) & {"bench_fal", "fal", "server"}}
    assert knowing == {"cli"}


LAZY = {
    *("__main__", "addresses", "cli", "connection", "download", "draw", "matching"),
    *("continuous_batching", "decoder_call", "device_answering", "prompt_rows", "resident_decoder", "resident_model"),
    "workers",
}
"""Modules of the package that `import florence_onnx` leaves for later."""

HEAVY = {
    *(
        "asyncio",
        "concurrent.futures",
        "difflib",
        "email",
        "http",
        "multiprocessing",
        "random",
        "shutil",
        "socket",
        "ssl",
    ),
    *("subprocess", "tempfile", "unittest", "urllib.request", "PIL.ImageDraw", "PIL.ImageFont"),
}
"""Of the standard library and Pillow: each costs milliseconds, and most callers need none."""


def modules_of(code: str) -> set[str]:
    """What is imported after some code ran in a fresh interpreter."""
    command = [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_import_is_light() -> None:
    """Over numpy and Pillow nothing but our own modules and a little of the standard library."""
    before = modules_of("import numpy, PIL.Image")
    new = modules_of("import florence_onnx") - before
    foreign = {name.split(".")[0] for name in new if name.split(".")[0] not in sys.stdlib_module_names}
    assert foreign <= {"florence_onnx", "numpy"}  # numpy.typing
    assert sorted(new & HEAVY) == []


def test_which_modules_wait_until_they_are_needed() -> None:
    loaded = {name for name in modules_of("import florence_onnx") if name.startswith("florence_onnx.")}
    ours = {f"florence_onnx.{path.stem}" for path in PACKAGE.glob("*.py")} - {"florence_onnx.__init__"}
    assert ours - loaded == {f"florence_onnx.{name}" for name in LAZY}


def test_the_demo_answers_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from florence_onnx import Florence2\nfrom PIL import Image\n"
        "print(Florence2.from_pretrained('demo', device='cpu').run('<CAPTION>', Image.new('RGB', (64, 64))).text)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("</s><s>")
