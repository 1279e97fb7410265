"""The models that the peers load: a checkpoint, our bundles, the layout of transformers.js. Made on demand and kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from benchmarks.checkpoints import SIZES
from benchmarks.costs import Costs
from florence_onnx.bundles import bundle
from florence_onnx.errors import FlorenceError
from florence_onnx.images import decoding

ROOT = Path(__file__).resolve().parents[1]
_GENERATION = (
    "no_repeat_ngram_size",
    "length_penalty",
    "early_stopping",
    "forced_bos_token_id",
    "forced_eos_token_id",
)


class PreparationError(Exception):
    """A model cannot be made; the message is the last line of the export's output."""


class Models:
    """One checkpoint and what is exported from it."""

    def __init__(
        self,
        source: str,
        work: Path,
        *,
        bundles: Mapping[str, Path] | None = None,
        progress: Callable[[str], None] = lambda step: None,
    ) -> None:
        """Takes a checkpoint and the folder for what is made from it.

        Args:
            source: A size, or the folder of a checkpoint in either layout.
            work: Folder for the exports; they are reused if they can be read.
            bundles: Existing bundles by name, which need no export.
            progress: Called with a line of text before something is made.
        """
        self.name = source if source in SIZES else Path(source).resolve().name
        self._source = source
        self._work = work.resolve()
        self._bundles = dict(bundles or {})
        self._progress = progress
        self._failed: dict[str, PreparationError] = {}

    def path(self, model: str) -> Path:
        """Returns the path of a model, see `jobs.Peer.model`; makes it if it does not exist.

        Raises:
            PreparationError: It cannot be made, now or at an earlier call.
        """
        if model in self._failed:
            raise self._failed[model]
        try:
            return self._find(model)
        except PreparationError as error:
            self._failed[model] = error
            raise

    def _find(self, model: str) -> Path:
        kind, _, precision = model.partition(":")
        if kind == "checkpoint":
            return self.checkpoint()
        if kind == "transformers.js":
            chosen = ("--precision", precision) if precision else ()
            return self._export("-".join([kind, *chosen[1:]]), "--layout", "transformers.js", *chosen)
        if precision in self._bundles:
            return self._bundles[precision].resolve()
        return self._export(precision, "--precision", precision)

    def checkpoint(self) -> Path:
        """Returns the folder of the checkpoint in transformers' native layout."""
        if self._source not in SIZES and not is_microsoft(Path(self._source)):
            return Path(self._source).resolve()
        path = self._work / f"{self.name}-checkpoint"
        if not (path / "config.json").is_file():
            self._progress(f"writing the checkpoint {self.name}")
            _run("benchmarks.checkpoints", self._source, str(path))
        return path

    def _export(self, name: str, *options: str) -> Path:
        path = self._work / f"{self.name}-{name}"
        if not _is_readable(path):
            checkpoint = self.path("checkpoint")
            self._progress(f"exporting {self.name} as {name}")
            _run("export", str(checkpoint), str(path), "--force", *options)
        return path

    def resize(self, image: Path) -> Path:
        """Resizes an image to the model's size as transformers does; returns the path of the new file."""
        size = Costs.read(self.path("checkpoint")).image_size
        path = self._work / f"{image.stem}-{size[0]}x{size[1]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        decoding.load(image).resize(size, Image.Resampling.BICUBIC).save(path)
        return path

    def generation(self) -> dict[str, Any]:
        """Returns the checkpoint's generation settings in full, so that every peer gets the same."""
        folder = self.path("checkpoint")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        file = folder / "generation_config.json"
        stated = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        both = {
            **config,
            **config["text_config"],
            **{name: value for name, value in stated.items() if value is not None},
        }
        found = {name: both[name] for name in _GENERATION if both.get(name) is not None}
        return {"forced_eos_token_id": both.get("eos_token_id", 2), **found}


def is_microsoft(checkpoint: Path) -> bool:
    """Whether a checkpoint is in Microsoft's original layout."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return "dim_embed" in config.get("vision_config", {})


def _is_readable(path: Path) -> bool:
    try:
        bundle.read(path)
    except FlorenceError:
        return False
    return True


def _run(module: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        _refuse(done.stdout, done.stderr, done.returncode)


def _refuse(output: str, errors: str, code: int) -> NoReturn:
    if code < 0:  # killed: the last line it printed is not the reason
        raise PreparationError(f"ended by signal {-code}")
    lines = [line for line in (errors or output).splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error:")]
    raise PreparationError((said or lines or [f"exit code {code}"])[-1].strip())
