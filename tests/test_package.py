"""Promises of the whole package: its public names, the order of imports between rooms, and no PyTorch."""

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
    "Cancel",
    "CancelledError",
    "CheckpointError",
    "Choice",
    "Deadline",
    "DeadlineError",
    "CorruptGraphError",
    "Detections",
    "EncodedImage",
    "Florence2",
    "FlorenceError",
    "GenerationOptions",
    "Grammar",
    "HubAccessError",
    "HubError",
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
    "Tiles",
    "UnknownTaskError",
    "VerificationError",
    "__version__",
    "tasks",
]

ROOMS = {
    "_version": set(),
    "errors": set(),
    "forks": set(),
    "images": {"forks", "errors", "numpy", "PIL"},
    "answers": {"errors", "images", "numpy", "PIL", "supervision"},
    "generation": {"errors", "numpy"},
    "tasks": {"answers", "errors"},
    "prompts": {"answers", "errors", "tasks"},
    "bundles": {"answers", "errors", "generation", "tasks", "numpy", "tokenizers", "huggingface_hub"},
    "grammar": {"answers", "bundles", "errors", "generation", "tasks", "numpy"},
    "runtime": {"forks", "bundles", "errors", "numpy", "onnxruntime"},
    "forms": {"_version", "answers", "errors", "images", "PIL", "pikepdf", "pycocotools"},
    "prediction": {
        "answers",
        "errors",
        "forms",
        "generation",
        "images",
        "runtime",
        "tasks",
        "numpy",
        "PIL",
        "supervision",
    },
    "inference": {"forks", "bundles", "errors", "generation", "images", "prediction", "runtime", "numpy", "PIL"},
    "limits": {"errors", "generation"},
    "parts": {"answers", "errors", "prediction", "tasks"},
    "batches": {
        *("answers", "errors", "generation", "images", "inference", "limits", "prediction", "tasks"),
        *("numpy", "PIL"),
    },
    "placing": {"answers", "batches", "bundles", "errors", "images", "inference", "prediction", "tasks"},
    "tiling": {"answers", "errors", "generation", "images", "prediction", "tasks", "PIL"},
    "detecting": {
        *("answers", "errors", "generation", "images", "inference", "limits", "prediction", "tasks", "tiling"),
        *("numpy", "PIL", "supervision"),
    },
    "evaluating": {
        "answers",
        "detecting",
        "errors",
        "generation",
        "prediction",
        "tasks",
        "matplotlib",
        "numpy",
        "pycocotools",
    },
    "run_arguments": {"answers", "bundles", "detecting", "generation", "images", "limits", "tasks", "tiling"},
    "streams": {"answers", "generation", "limits", "parts", "prediction"},
    "loading": {"bundles", "errors", "inference", "runtime", "numpy"},
    "model": {
        *(
            "answers",
            "batches",
            "bundles",
            "detecting",
            "errors",
            "generation",
            "grammar",
            "images",
            "inference",
            "limits",
            "loading",
            "parts",
            "placing",
            "prediction",
            "prompts",
            "run_arguments",
            "runtime",
            "streams",
            "tasks",
            "tiling",
        ),
        *("numpy", "PIL", "typing_extensions"),
    },
    "batch": {
        *("_version", "answers", "errors", "generation", "images", "model", "prediction", "runtime", "tasks"),
        *("PIL", "av", "filelock", "numpy", "pyarrow", "pypdfium2"),
    },
    "ray": {
        *("answers", "batch", "bundles", "errors", "generation", "images", "prediction", "tasks"),
        *("PIL", "numpy", "pyarrow"),
    },
    "compat": {
        *("answers", "bundles", "errors", "generation", "images", "loading", "model", "prompts", "tasks"),
        *("numpy", "PIL"),
    },
    "image": {"images"},
    "postprocess": {"answers", "tasks"},
    "fal": {
        *(
            "forks",
            "answers",
            "detecting",
            "errors",
            "generation",
            "images",
            "inference",
            "limits",
            "model",
            "prediction",
        ),
        *("tasks", "tiling", "PIL"),
    },
    "server": {
        *(
            "_version",
            "answers",
            "detecting",
            "errors",
            "fal",
            "forks",
            "generation",
            "images",
            "model",
            "parts",
            "prediction",
            "streams",
            "tasks",
            "tiling",
        ),
        *("fastapi", "filelock", "h11", "prometheus_client", "pythonjsonlogger", "starlette", "uvicorn"),
    },
    "bench_fal": {
        *("_version", "answers", "errors", "fal", "images", "model", "tasks"),
        *("fal_client", "httpx", "numpy", "rapidfuzz", "rich"),
    },
    "mcp_server": {
        "forks",
        "_version",
        "answers",
        "detecting",
        "errors",
        "images",
        "model",
        "prediction",
        "tasks",
        "PIL",
        "mcp",
        "pydantic",
    },
    "commands": {
        *(
            "_version",
            "answers",
            "batch",
            "bench_fal",
            "bundles",
            "detecting",
            "errors",
            "evaluating",
            "fal",
            "forms",
            "generation",
            "grammar",
            "images",
            "limits",
            "loading",
            "mcp_server",
            "model",
        ),
        *("prediction", "prompts", "ray", "runtime", "server", "tasks", "tiling", "huggingface_hub", "rich", "typer"),
    },
    "demo": set(),
    "__init__": {
        *(
            "_version",
            "answers",
            "detecting",
            "errors",
            "generation",
            "grammar",
            "model",
            "prediction",
            "tasks",
            "tiling",
        ),
    },
    "__main__": {"commands", "errors"},
}
"""What each room may import: rooms above it in this table, and third-party packages."""

OPTIONAL = {"huggingface_hub", "onnxruntime", "supervision"}
"""Packages that are imported inside functions only, so that they need not be installed until they are used."""


def room(module: str) -> str:
    """The room of a module, given its path inside the package: `runtime` for `runtime.engine`."""
    return module.split(".", maxsplit=1)[0]


def sources(name: str) -> list[Path]:
    """The files of a room, which is a module or a folder."""
    folder = PACKAGE / name
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{name}.py"]


def imports(path: Path) -> set[str]:
    """Imports of a file: our modules by their path inside the package, third-party ones by their top-level package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: absolute imports only"
            found |= {_resolve(str(node.module), alias.name) for alias in node.names}
    own = {name.removeprefix("florence_onnx.") for name in found if name.startswith("florence_onnx.")}
    others = {name.split(".")[0] for name in found if not name.startswith("florence_onnx")}
    return own | {name for name in others if name not in sys.stdlib_module_names}


def _resolve(module: str, name: str) -> str:
    """The module that `from module import name` imports; for names that `florence_onnx` re-exports, their origin."""
    if (PACKAGE.parent / module.replace(".", "/") / f"{name}.py").is_file():
        return f"{module}.{name}"
    if (PACKAGE.parent / module.replace(".", "/") / name).is_dir():
        return f"{module}.{name}"
    if module == "florence_onnx":
        return str(getattr(getattr(florence_onnx, name), "__module__", "florence_onnx._version"))
    return module


def test_public_names_are_exact() -> None:
    assert sorted(florence_onnx.__all__) == sorted(PUBLIC)
    assert all(hasattr(florence_onnx, name) for name in PUBLIC)


def test_every_error_is_public_and_documented() -> None:
    from florence_onnx import errors

    names = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert names <= set(PUBLIC)
    assert all(name in (errors.__doc__ or "") for name in names)


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_import_only_what_the_table_allows(name: str) -> None:
    found = {room(module) for path in sources(name) for module in imports(path)} - {name}
    assert found <= ROOMS[name]


def test_the_table_has_no_cycle() -> None:
    above: set[str] = set()
    for name, allowed in ROOMS.items():
        assert {each for each in allowed if each in ROOMS} <= above, name
        above.add(name)


def test_every_module_has_a_room() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    assert modules == set(ROOMS)


@pytest.mark.parametrize("name", [name for name in ROOMS if (PACKAGE / name).is_dir()])
def test_rooms_say_what_they_are_for(name: str) -> None:
    tree = ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8"))
    assert len(ast.get_docstring(tree) or "") > 40


@pytest.mark.parametrize("name", ROOMS)
def test_modules_of_a_room_form_no_cycle(name: str) -> None:
    """Imports inside functions and for the type checker count too."""
    graph = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): {
            each for each in imports(path) if room(each) == name
        }
        for path in sources(name)
    }
    graph = {module: found - {module} for module, found in graph.items()}
    while leaves := {module for module, found in graph.items() if not found & graph.keys()}:
        graph = {module: found for module, found in graph.items() if module not in leaves}
    assert graph == {}


@pytest.mark.parametrize("name", ROOMS)
def test_optional_packages_are_imported_inside_functions(name: str) -> None:
    for path in sources(name):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
        names += [str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert not {each.split(".")[0] for each in names} & OPTIONAL, path.name


LAZY = {
    *(
        "__main__",
        "answers.draw",
        "answers.reference_dict",
        "answers.settled",
        "answers.supervision_detections",
        "answers.matching",
        "answers.plain",
        "answers.scoring",
        "bundles.configuration",
        "bundles.pulling",
        "detecting.asking",
        "image",
        "images.addresses",
        "images.connection",
        "images.decoder_child",
        "images.decoder_processes",
        "images.download",
        "images.transfer",
        "parts",
        "run_arguments",
        "streams",
    ),
    *("inference.continuous_batching", "inference.decoder_call", "inference.device_answering", "inference.slot_table"),
    *("inference.resident_decoder", "inference.resident_model", "postprocess", "runtime.workers"),
    *("tiling.asking", "tiling.merging", "tiling.pieces"),
    *(
        f"forms.{name}"
        for name in ("boxes", "gallery", "label_studio", "labelled", "pages", "searchable_pdf", "writing")
    ),
    *(f"evaluating.{name}" for name in ("asking", "calibrating", "coco", "measuring", "plotting")),
}
"""Modules that `import florence_onnx` does not import; they are imported when they are first needed."""

ABOVE_MODEL = {"batch", "bench_fal", "commands", "compat", "demo", "fal", "mcp_server", "ray", "server"}
"""Rooms above `model`, which `import florence_onnx` never imports."""

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
"""Modules of the standard library and Pillow that take milliseconds to import and that most callers do not need."""


def modules_of(code: str) -> set[str]:
    """The modules that are imported after some code ran in a fresh interpreter."""
    command = [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_import_is_light() -> None:
    """Beyond numpy and Pillow it imports our own modules and a little of the standard library."""
    before = modules_of("import numpy, PIL.Image")
    new = modules_of("import florence_onnx") - before
    foreign = {name.split(".")[0] for name in new if name.split(".")[0] not in sys.stdlib_module_names}
    assert foreign <= {"florence_onnx", "numpy"}  # numpy.typing
    assert sorted(new & HEAVY) == []


def test_which_modules_are_imported_lazily() -> None:
    loaded = {name for name in modules_of("import florence_onnx") if name.startswith("florence_onnx.")}
    lower = [path for name in ROOMS if name not in ABOVE_MODEL for path in sources(name) if path.stem != "__init__"]
    ours = {"florence_onnx." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in lower}
    assert ours - loaded == {f"florence_onnx.{name}" for name in LAZY}


def test_the_demo_answers_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from florence_onnx import Florence2\nfrom PIL import Image\n"
        "print(Florence2.from_pretrained('demo', device='cpu').run('<CAPTION>', Image.new('RGB', (64, 64))).text)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("</s><s>")
