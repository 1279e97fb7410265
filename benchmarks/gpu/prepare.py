"""Makes the folder to copy to a machine with a GPU and without a network: `python -m benchmarks.gpu.prepare`.

It has skeletons of the models (`skeleton.py`), and onnxruntime-gpu without the kernels for other GPUs, packed by the
scripts in `--tools`, which are not part of the repository. Skeletons and the packed runtime in `--work` and `--folder`
are not made again: remove them after a change of the export. At the end it prints the command for the device machine,
and how many bytes are copied.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu import skeleton
from benchmarks.gpu.sources import DEMO, DEMO_CHECKPOINT, MODELS, PLAIN
from benchmarks.models import ROOT, Models

MAX_TRAVEL_BYTES = 64 * 2**20
"""Most bytes that can be copied to the device machine, the tracked files included."""
MAX_COMMAND = 2000
"""Most characters of a command for the device machine."""
UNPACK = "unpack_ort_gpu.py"
PREVIOUS = "previous"
"""Subfolder for the results of earlier calls."""
NEEDLESS = re.compile(r"^onnxruntime/(transformers|quantization|tools|backend|datasets)/|\.(h|md|txt)$")
"""Files of onnxruntime-gpu that no session needs."""
_XZ: list[dict[str, Any]] = [
    {"id": lzma.FILTER_X86},
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**28},
]
"""Saves 2 MiB compared with xz's default, and takes three minutes."""


def pack_models(sizes: list[str], folder: Path, work: Path) -> None:
    """Writes the skeletons: every size in fp16 and in the layout of transformers.js, and the demo model in fp32.

    Args:
        sizes: Keys of `benchmarks.checkpoints.SIZES`.
        folder: Folder to write to.
        work: Folder in which checkpoints and skeletons are kept.
    """
    wanted = [(DEMO, "fp32"), *((size, kind) for size in sizes for kind in ("fp16", PLAIN))]
    packed = []
    for size, kind in wanted:
        target = work / f"{size}-{kind}.tar"
        if not target.is_file():
            source = str(DEMO_CHECKPOINT) if size == DEMO else size
            checkpoint = Models(source, work, progress=print).path("checkpoint")
            with tempfile.TemporaryDirectory(dir=work) as staging:
                exported = export(checkpoint, kind, Path(staging) / "bundle")
                skeleton.pack(exported, target, checkpoint, exact=size == DEMO)
        packed.append(target)
    write_archive(packed, folder / MODELS)


def export(checkpoint: Path, kind: str, output: Path) -> Path:
    """Exports a model and compares its graphs with torch, but not its answers, which random weights make meaningless.

    Args:
        checkpoint: Folder of the checkpoint.
        kind: `fp32`, `fp16`, or `plain` for the layout of transformers.js in fp16.
        output: Folder to create.

    Returns:
        `output`.
    """
    from export.bundles.writer import export_bundle
    from export.checkpoints.checkpoint import load_checkpoint
    from export.transformers_js.writer import export_transformers_js

    loaded = load_checkpoint(checkpoint)
    if kind == PLAIN:
        export_transformers_js(loaded, output, precision="fp16", images=(), progress=print)
    else:
        export_bundle(loaded, output, precision=kind, images=(), progress=print)
    return output


def write_archive(skeletons: list[Path], output: Path) -> None:
    """Writes skeletons to the archive that `Sources` reads."""
    with tarfile.open(output, "w:xz", preset=9) as archive:
        for path in skeletons:
            archive.add(path, arcname=path.name)


def pack_runtime(tools: Path, folder: Path, work: Path) -> None:
    """Writes onnxruntime-gpu as `ortgpu.json` and `ortgpu.tar.xz.000`, and the script that unpacks it.

    Args:
        tools: Folder with `pack_ort_gpu.py` and `unpack_ort_gpu.py`.
        folder: Folder to write to.
        work: Folder in which the wheel, a quarter of a gigabyte, is kept.

    Raises:
        FileNotFoundError: The scripts are missing.
    """
    shutil.copy(tools / UNPACK, folder / UNPACK)
    if (folder / "ortgpu.json").is_file():
        return
    packed = work / "ortgpu"
    if not (packed / "ortgpu.json").is_file():
        subprocess.run([sys.executable, str(tools / "pack_ort_gpu.py"), str(packed)], check=True)
    description = json.loads((packed / "ortgpu.json").read_text(encoding="utf-8"))
    parts = b"".join((packed / part["name"]).read_bytes() for part in description["parts"])
    print("packing onnxruntime-gpu anew, smaller", flush=True)
    data = lzma.compress(_without_needless(lzma.decompress(parts)), filters=_XZ)
    name = "ortgpu.tar.xz.000"
    (folder / name).write_bytes(data)
    part = {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "ortgpu.json").write_text(json.dumps({**description, "parts": [part], "xz": len(data)}))


def _without_needless(archive: bytes) -> bytes:
    """Removes the files that match `NEEDLESS` from a tar archive."""
    kept = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(archive)) as source, tarfile.open(fileobj=kept, mode="w") as target:
        for member in source:
            if not NEEDLESS.search(member.name):
                target.addfile(member, source.extractfile(member))
    return kept.getvalue()


def command(folder: str, arguments: str = "large base", budget_s: int = 540) -> str:
    """Returns the command to run on the device machine, in the root of the repository.

    Args:
        folder: The folder that was copied, relative to the root.
        arguments: Arguments of `benchmarks.gpu`.
        budget_s: Seconds after which no step is started or kept running.
    """
    return (
        f"cp -r {folder}/{PREVIOUS}/. $OUT/ 2>/dev/null; export PYTHONUNBUFFERED=1 PYTHONPATH=/tmp/ortgpu; "
        f"python3 {folder}/{UNPACK} {folder} /tmp/ortgpu && "
        f"python3 -m benchmarks.gpu {arguments} --device cuda --out $OUT --carried {folder} "
        f"--work /tmp/gpu-work --budget-s {budget_s} 2>&1 | tee $OUT/log.txt"
    )


def travelling_bytes(folder: Path) -> dict[str, int]:
    """Returns the bytes to copy: files that git does not ignore (`tree`), and the folder (`carried`)."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    names = [name for name in listed.stdout.decode().split("\0") if name]
    tree = sum((ROOT / name).stat().st_size for name in names if (ROOT / name).is_file())
    carried = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"tree": tree, "carried": carried}


def main() -> None:
    """Makes the folder, and prints the command. The exit code is 1 if it is too large to be copied."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["large", "base"])
    parser.add_argument("--folder", type=Path, default=ROOT / ".gpu", help="ignored by git; named in `carry`")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "benchmarks" / ".work", help="folder for exports; they are reused"
    )
    parser.add_argument("--tools", type=Path, default=ROOT.parent / "shared" / "tools" / "gpu")
    parser.add_argument("--without-runtime", action="store_true", help="only the models")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    (folder / PREVIOUS).mkdir(parents=True, exist_ok=True)
    arguments.work.mkdir(parents=True, exist_ok=True)
    pack_models(arguments.sizes, folder, arguments.work)
    if not arguments.without_runtime:
        pack_runtime(arguments.tools, folder, arguments.work)
    sizes = travelling_bytes(folder)
    line = command(folder.name, " ".join(arguments.sizes))
    assert len(line) <= MAX_COMMAND, len(line)
    total = sum(sizes.values())
    print(f"\ntravels: {', '.join(f'{name} {size / 2**20:.2f} MiB' for name, size in sizes.items())}, of 64 in all")
    print(f"\nrun, with timeout_s 590 and carry [{json.dumps(folder.name)}]:\n\n{line}\n")
    print(f"before the next call: copy gpu-cuda.json of this one to {folder.name}/{PREVIOUS}/")
    sys.exit(1 if total > MAX_TRAVEL_BYTES else 0)


if __name__ == "__main__":
    main()
