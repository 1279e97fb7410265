"""How the suite runs: one core and one thread for each worker, exports made once for all of them, skips told in short.

`pytest` starts a worker for each core (pytest-xdist). A file's tests run in one worker, in their order, so that the
file's server, browser or model is started once; the files that take longest start first. `pytest -n 0` runs everything
in this process, which is also what naming one file or one test does.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Before numpy, torch and ONNX Runtime start their pools: two pools that wait actively for each other's cores make a
# small model many times slower. The processes that tests start inherit it.
for pool in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(pool, "1")

if TYPE_CHECKING:
    from PIL import Image

    from export.checkpoints.checkpoint import Checkpoint

NO_TORCH = "needs torch and transformers: pip install -e '.[export]'"

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
"""`gw0`, `gw1`, … in a worker; empty in a process that distributes tests or runs them itself."""

LONGEST_FIRST = (
    "tests/test_wheel.py",
    "tests/export/test_export.py",
    "tests/server/test_playground.py",
    "tests/fal/test_fal_clients.py",
    "tests/server/test_server.py",
    "tests/batch/test_batch.py",
    "tests/benchmarks/test_compare.py",
    "tests/benchmarks/test_gpu.py",
    "tests/export/test_verify_command.py",
    "tests/test_demo_model.py",
    "tests/bench_fal/test_bench_fal.py",
    "tests/export/test_parity.py",
    "tests/commands/test_cli.py",
    "tests/generation/test_settings.py",
    "tests/export/test_adapters.py",
    "tests/export/test_unusual_checkpoints.py",
    "tests/export/test_quantization.py",
    "tests/export/test_checkpoint.py",
    "tests/evaluating/test_evaluate.py",
    "tests/server/test_extensions.py",
    "tests/test_limits.py",
    "tests/test_streams.py",
)
"""Files in the order in which they start: those of more than ten seconds, so that what is left for the end is short. The
first two do not wait for each other's exports."""


# ------------------------------------------------------------------------------------------------------------- workers


def pytest_configure() -> None:
    """Binds a worker, and the processes that its tests start, to one core.

    ONNX Runtime then takes one thread (`florence_onnx.runtime.cpu.num_cores`), in servers and commands too, and two
    workers do not slow each other down.
    """
    if not WORKER or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(WORKER.removeprefix("gw")) % len(cores)]})


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """None for the number of cores; 0, which is no worker, where a single file or single tests are asked for."""
    files = {argument.partition("::")[0] for argument in config.args}
    return 0 if len(files) == 1 and files.pop().endswith(".py") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take longest first, which is the order in which workers are given them."""
    if WORKER:
        ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
        items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0], len(ranks)))


# --------------------------------------------------------------------------------------------------------------- skips


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line for each reason to skip, with how many tests it holds back and how to get what they need."""
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    terminalreporter.section(f"{len(skipped)} skipped")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:5} {reason}")


# ------------------------------------------------------------------------------------------------------------- exports


class Exported:
    """A random-weight checkpoint and its export, which lies beside the folder `checkpoint`."""

    def __init__(self, checkpoint: Checkpoint, bundle: Path) -> None:
        self.checkpoint = checkpoint
        self.bundle = bundle


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all workers of a run share: the folder that `FLORENCE_ONNX_KEEP_BUNDLES` names, or the run's own."""
    kept = os.environ.get("FLORENCE_ONNX_KEEP_BUNDLES")
    if kept:
        return Path(kept).resolve()
    own = tmp_path_factory.getbasetemp()
    return (own.parent if WORKER else own) / "shared"


@pytest.fixture(scope="session")
def export_of(shared_folder: Path) -> Callable[[str, str], Exported]:
    """Exports by the name of a model in `tests.exported_bundles` and a precision, each made once. Not to be changed."""
    pytest.importorskip("torch", reason=NO_TORCH)
    pytest.importorskip("optimum.exporters", reason=NO_TORCH)
    from export.checkpoints.checkpoint import load_checkpoint
    from tests import exported_bundles

    def export(model: str, precision: str) -> Exported:
        bundle = exported_bundles.bundle(shared_folder, model, precision)
        return Exported(load_checkpoint(bundle.parent / "checkpoint"), bundle)

    return export


@pytest.fixture(scope="session")
def tiny(export_of: Callable[[str, str], Exported]) -> Exported:
    """The smallest regular model, in fp32."""
    return export_of("tiny", "fp32")


@pytest.fixture(scope="session")
def odd(export_of: Callable[[str, str], Exported]) -> Exported:
    """Every size unusual, in fp32."""
    return export_of("odd", "fp32")


@pytest.fixture(scope="session")
def tiny_fp16(export_of: Callable[[str, str], Exported]) -> Exported:
    """The smallest regular model, in fp16."""
    return export_of("tiny", "fp16")


@pytest.fixture(scope="session")
def published(export_of: Callable[[str, str], Exported], shared_folder: Path) -> Path:
    """`tiny` in the layout of transformers.js, in the precisions that repositories have. Not to be changed."""
    from tests import exported_bundles

    export_of("tiny", "transformers-js-fp32")  # skips where there is no torch
    return exported_bundles.published(shared_folder)


@pytest.fixture(scope="session")
def sized(export_of: Callable[[str, str], Exported]) -> Exported:
    """The smallest regular model with vision encoders for `exported_bundles.SIZES`, in fp32."""
    return export_of("tiny", "sizes-fp32")


# -------------------------------------------------------------------------------------------------------------- images


@pytest.fixture(scope="session")
def photographs() -> list[Image.Image]:
    """Photographs of other sizes and aspects, from scikit-image's wheel."""
    import numpy as np
    from PIL import Image

    data = pytest.importorskip("skimage.data", reason="the photographs come with scikit-image")
    return [Image.fromarray(np.asarray(image)) for image in (data.astronaut(), data.chelsea(), data.coffee())]
