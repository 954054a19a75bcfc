"""What a run would do, before it does it: inputs, partitions, phases, columns, weights, disk, and how long."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from imgcurate import schema
from imgcurate.backend import cpu_count, get_backend
from imgcurate.errors import ImgcurateError
from imgcurate.frame import read_group
from imgcurate.lazy import torch
from imgcurate.origins import ShardOrigin
from imgcurate.pipeline import Pipeline
from imgcurate.stages.base import IMAGE, ProcessingStage
from imgcurate.stages.executor import Program
from imgcurate.storage import free_bytes, is_local, local_path

__all__ = ["Estimate", "estimate_run"]

_LOOKED_AT: Final = 5
_BESIDES: Final = "starting workers, duplicates, copying and the report come on top, some 20 s at least"
_TRIED: Final = 64
_GIB: Final = 1024**3
_SCALAR_BYTES: Final = 8
# A row's strings, spans and member names, compressed.
_ROW_BYTES: Final = 120


@dataclass(frozen=True)
class Estimate:
    """What a run would do.

    Attributes
    ----------
    inputs, input_bytes : int
        How many inputs there are, and their size; None where it is not known, as of folders.
    samples : int
        Estimated from the first, last and some other inputs; exact if these are all.
    partitions : int
        Units of work.
    phases : list of (str, list of str)
        What runs together, with its stages.
    columns : list of str
        Of the catalog.
    weights : dict of str to str
        Models that are needed: the file, or that it is to be fetched.
    catalog_bytes, shards_bytes : int
        About how large the output is at most: all that is read may be kept.
    free_bytes : int or None
        On the disk of the output.
    workers : int
        Processes on this machine, if no scheduler is named.
    images_per_s : float or None
        Of one worker, measured on some images of the first input; None if it could not be tried.
    seconds : float or None
        Of the phase that decodes, on this machine.
    notes : list of str
        What could not be found out, and why.
    """

    inputs: int
    input_bytes: int | None
    samples: int
    partitions: int
    phases: list[tuple[str, list[str]]]
    columns: list[str]
    weights: dict[str, str]
    catalog_bytes: int
    shards_bytes: int | None
    free_bytes: int | None
    workers: int
    images_per_s: float | None
    seconds: float | None
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """Return it as (what, text) for people."""
        size = "size not known" if self.input_bytes is None else _gib(self.input_bytes)
        made = [("inputs", f"{self.inputs:,}, {size}, about {self.samples:,} samples")]
        made.append(("partitions", f"{self.partitions:,}"))
        made += [(f"phase {name}", ", ".join(stages) or "index only") for name, stages in self.phases]
        made.append(("columns", ", ".join(self.columns)))
        made += [(f"weights of {name}", text) for name, text in self.weights.items()]
        output = f"catalog about {_gib(self.catalog_bytes)}"
        if self.shards_bytes is not None:
            output += f", shards at most {_gib(self.shards_bytes)}"
        if self.free_bytes is not None:
            output += f"; {_gib(self.free_bytes)} are free"
        made.append(("output", output))
        made.append(("workers", f"{self.workers}"))
        if self.seconds is not None:
            rate = f"{self.images_per_s:,.1f} images/s measured in one worker"
            made.append(("time", f"about {_time(self.seconds)} to read, decode and score ({rate}); {_BESIDES}"))
        return [*made, *(("note", note) for note in self.notes)]

    @property
    def too_large(self) -> bool:
        """Whether the output may not fit on its disk."""
        return self.free_bytes is not None and self.catalog_bytes + (self.shards_bytes or 0) > self.free_bytes


def estimate_run(
    pipeline: Pipeline, output_dir: str, *, device: str = "auto", n_workers: int | None = None, measure: bool = True
) -> Estimate:
    """Look at what a pipeline would do; nothing is written or downloaded.

    Parameters
    ----------
    pipeline : Pipeline
        What is asked about.
    output_dir : str
        Where its output would go.
    device, n_workers
        As in :meth:`Pipeline.run`.
    measure : bool
        Decode and score some images, if the weights are there, to tell how long it takes.

    Raises
    ------
    ConfigError
        If the pipeline cannot work.
    InputError
        If an input does not exist.
    """
    plan = pipeline.plan()
    folder = str(Path(local_path(output_dir)).absolute()) if is_local(output_dir) else output_dir
    origin = ShardOrigin(plan, folder)
    described = origin.identity["inputs"]
    sizes = [d.get("nbytes") for d in described]
    input_bytes = sum(sizes) if all(isinstance(n, int) for n in sizes) else None
    notes: list[str] = []
    samples, first = _samples(origin, sizes, notes)
    types = {**plan.types, **origin.types}
    columns = schema.arrow_schema(types, types).names
    weights = _weights(pipeline)
    workers = n_workers or (torch.cuda.device_count() if get_backend(device).is_gpu else cpu_count())
    rate = None
    stages = plan.phases[0].batch_stages
    if measure and stages and first is not None:
        missing = [name for name, text in weights.items() if text.startswith("to be fetched")]
        if missing:
            notes.append(f"how long it takes was not measured: the weights of {missing[0]} are not here yet")
        else:
            rate = _rate(Program(stages, plan.reader, get_backend(device).name, origin.options), first, notes)
    seconds = samples / (rate * workers) if rate else None
    made = Estimate(
        len(described), input_bytes, samples, origin.n_parts,
        [(p.label, [s.name for s in p.stages]) for p in plan.phases], columns, weights,
        samples * _row_bytes(types, pipeline), input_bytes if plan.writer else None, free_bytes(folder), workers,
        rate, seconds, notes,
    )  # fmt: skip
    if plan.writer is None:
        notes.append("no shards are written: the pipeline has no ImageWriterStage")
    if not any(IMAGE in stage.needs for stage in stages):
        notes.append("no stage looks at the images: none is decoded, and broken ones are not found")
    if made.too_large:
        notes.append("the output may not fit on its disk, if nearly all is kept")
    return made


def _samples(origin: ShardOrigin, sizes: list[int | None], notes: list[str]) -> tuple[int, pa.Table | None]:
    """Return about how many samples there are, and the rows of the first input that has some."""
    count = len(origin.shards)
    step = max(1, (count - 1) // (_LOOKED_AT - 1))
    chosen = list(range(0, count, step))[: _LOOKED_AT - 1]
    chosen += [count - 1] if count - 1 not in chosen else []
    rows, nbytes, first = 0, 0, None
    for number in chosen:
        try:
            table = read_group(
                ((number, origin.shards[number]),), origin.plan.reader.members, origin.options, origin.sidecars
            )
        except ImgcurateError as exc:
            notes.append(str(exc))
            continue
        rows += len(table)
        nbytes += sizes[number] or 0
        first = first if first is not None or not len(table) else table
    known = [n for n in sizes if n]
    if len(chosen) == count:
        return rows, first
    if len(known) == count and nbytes:
        return round(rows * sum(known) / nbytes), first
    return round(rows * count / len(chosen)), first


def _weights(pipeline: Pipeline) -> dict[str, str]:
    """Return where the weights of each model are, or that they are to be fetched."""
    from imgcurate.models import clip_weights
    from imgcurate.models.head_files import find_head
    from imgcurate.stages import ImageAestheticFilterStage, ImageEmbeddingStage, ImageNSFWFilterStage

    found: dict[str, Path | None] = {}
    encoder = ""
    for stage in pipeline.stages:
        if isinstance(stage, ProcessingStage) and stage.encoder:
            encoder = stage.encoder
        if isinstance(stage, ImageEmbeddingStage) and stage.model != "tiny-image" and stage.pretrained != "random":
            name = f"{stage.model}, {stage.pretrained}"
            found[name] = clip_weights.present(stage.model, stage.pretrained, stage.model_dir)
        elif isinstance(stage, (ImageAestheticFilterStage, ImageNSFWFilterStage)):
            head = "aesthetic" if isinstance(stage, ImageAestheticFilterStage) else "nsfw"
            found[type(stage).__name__] = find_head(head, encoder, stage.model_dir)
    return {name: str(path) if path else "to be fetched when the run begins" for name, path in found.items()}


def _rate(program: Program, rows: pa.Table, notes: list[str]) -> float | None:
    """Return how many samples a second a program does, after a first batch for which it loads its models."""
    ok = rows.filter(pc.equal(rows[schema.STATUS], schema.STATUS_OK)).slice(0, _TRIED)
    if not program.decodes or not len(ok):
        return None
    try:
        program.run(ok)
        start = time.perf_counter()
        program.run(ok)
    except ImgcurateError as exc:
        notes.append(f"how long it takes was not measured: {exc}")
        return None
    return len(ok) / (time.perf_counter() - start)


def _row_bytes(types: dict[str, pa.DataType], pipeline: Pipeline) -> int:
    """Return about how many bytes a row of the catalog takes."""
    dim = 0
    if schema.EMBEDDING in types:
        dim = next((_dim(s) for s in pipeline.stages if isinstance(s, ProcessingStage) and s.encoder), 0) or 768
    scalars = sum(_SCALAR_BYTES for t in types.values() if pa.types.is_primitive(t))
    return _ROW_BYTES + scalars + 4 * dim


def _dim(stage: ProcessingStage) -> int:
    from imgcurate.models import clip_weights

    model = getattr(stage, "model", None)
    return clip_weights.embed_dim(model) if model and model != "tiny-image" else 768


def _gib(nbytes: int) -> str:
    return f"{nbytes / _GIB:,.2f} GiB" if nbytes >= _GIB / 10 else f"{nbytes / 1024**2:,.1f} MiB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
