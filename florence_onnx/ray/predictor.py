"""`Predictor`: a model in an actor of Ray Data."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from florence_onnx import tasks as known
from florence_onnx.answers.locations import Region
from florence_onnx.batch.answering import Loading, Question, answer
from florence_onnx.batch.arrow import to_table
from florence_onnx.batch.rows import Row
from florence_onnx.bundles.bundle import DEMO
from florence_onnx.errors import InputError
from florence_onnx.generation.options import GenerationOptions
from florence_onnx.images import opening
from florence_onnx.ray.columns import Columns, to_items, with_kept
from florence_onnx.tasks import Task

if TYPE_CHECKING:
    import pyarrow


class Predictor:
    """A callable class for `ray.data.Dataset.map_batches`, which loads the model once an actor.

    Encoded images come in, and text and numbers go out: pixels and features never enter the object store. Images are read and
    decoded by threads of the actor while its model works. A row whose image or answer fails becomes a row with `error`.

    ```python
    answers = dataset.map_batches(
        Predictor,
        fn_constructor_kwargs={"model": "owner/name", "tasks": ["caption"]},
        batch_format="pyarrow",
        batch_size=32,
        num_cpus=4,
        compute=ray.data.ActorPoolStrategy(size=8),
    )
    ```
    """

    def __init__(
        self,
        model: str = DEMO,
        *,
        tasks: Task[Any] | str | Sequence[Task[Any] | str],
        columns: Columns | None = None,
        text: str | None = None,
        region: Region | str | None = None,
        options: GenerationOptions | None = None,
        public_only: bool = False,
        max_pixels: int = opening.MAX_PIXELS,
        num_threads: int | None = None,
        **loading: Any,
    ) -> None:
        """Loads the model.

        Args:
            model: A bundle directory that is on every node, a hub repository, or `"demo"`.
            tasks: Tasks, their slugs or tokens; an image is encoded once for all.
            columns: Names of the data set's columns; None for `image` and `id`.
            text: For tasks that take a text, where the column has none.
            region: For tasks that take a region, where the column has none.
            options: Generation options.
            public_only: Whether URLs must lead to the public internet: for data from strangers.
            max_pixels: Larger images are errors.
            num_threads: Threads of the model on a CPU; None for as many as the actor has CPUs (`num_cpus` of `map_batches`),
                because ONNX Runtime would take all cores of the node in each actor.
            **loading: Other arguments of `Florence2.from_pretrained`, such as `device` and `precision`.

        Raises:
            InputError: A task is unknown or lacks its text or region, or an option is wrong.
            BundleError: The model is missing or damaged.
            ProviderError: The execution provider cannot run here.
        """
        self._columns = columns or Columns()
        self._name = model
        threads = _assigned_cpus() if num_threads is None else num_threads
        self._model = Loading(model, loading).load(num_threads=threads)
        names = [tasks] if isinstance(tasks, str | Task) else list(tasks)
        asked = tuple(dict.fromkeys(known.get(name, self._model.tasks) for name in names))
        region = Region.from_text(region) if isinstance(region, str) else region
        self._question = Question(
            asked, text, region, options or GenerationOptions(), public_only=public_only, max_pixels=max_pixels
        )
        _check(self._question, self._columns)
        self._model.check_options(self._question.options)
        self._counters = _Counters()

    def __call__(self, batch: Any) -> pyarrow.Table:
        """Answers a batch.

        Args:
            batch: N images: a `pyarrow.Table`, or a dict of arrays.

        Returns:
            N x T rows for T tasks, those of an image together and in the order of the batch, with the columns
            `batch.arrow.TYPES` and those that are kept.

        Raises:
            InputError: A column is missing, or images are decoded already.
            ProviderError: The device failed.
            MissingExtraError: pyarrow is not installed.
        """
        items = to_items(batch, self._columns)
        rows = list(answer(items, self._model, self._question, model_name=self._name))
        self._counters.add(rows)
        return with_kept(to_table(rows), batch, self._columns.keep, len(self._question.tasks))


def _check(question: Question, columns: Columns) -> None:
    if not question.tasks:
        raise InputError("give at least one task")
    for task in question.tasks:
        if task.takes_text and question.text is None and columns.text is None:
            raise InputError(f"{task.slug} needs a text: give text, or name a column by Columns(text=…)")
        if task.takes_region and question.region is None and columns.region is None:
            raise InputError(f"{task.slug} needs a region: give region, or name a column by Columns(region=…)")


def _assigned_cpus() -> int | None:
    """CPUs that Ray has given to this actor, at least 1; None outside of Ray."""
    ray = sys.modules.get("ray")  # a process that has not imported it is none of its workers
    if ray is None or not ray.is_initialized():
        return None
    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))


class _Counters:
    """Ray's metrics of an actor: rows by the class of their error, and milliseconds."""

    def __init__(self) -> None:
        self._rows: Any = None
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized():
            from ray.util import metrics

            labels = ("task", "error_type")
            self._rows = metrics.Counter("florence_onnx_rows", "Rows that were answered.", labels)
            self._milliseconds = metrics.Counter("florence_onnx_milliseconds", "Time of the model.", ("task",))

    def add(self, rows: Iterable[Row]) -> None:
        if self._rows is None:
            return
        for row in rows:
            self._rows.inc(1, {"task": row.task, "error_type": row.error_type or ""})
            if row.milliseconds > 0:
                self._milliseconds.inc(row.milliseconds, {"task": row.task})
