"""The command line, and nothing else."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import dask
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from imgcurate import schema
from imgcurate.errors import ConfigError, ImgcurateError, printable
from imgcurate.progress import show_progress

__all__ = ["app", "main"]

app = typer.Typer(
    name="imgcurate",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Curate image data sets in WebDataset shards: embed, score, filter, remove duplicates, write shards.",
)
_debug = False
_MAX_SHARD_ROWS: Final = 50
_MAX_PROBLEM_ROWS: Final = 20
_MAX_EXTENSIONS: Final = 30
_MAX_MESSAGE: Final = 2000

Inputs = Annotated[
    list[str], typer.Argument(metavar="INPUT...", help="Tars, Parquet, folders: paths, URLs, globs, {braces}.")
]
Output = Annotated[str, typer.Option("-o", "--output", help="Output folder of the run.")]
Device = Annotated[str, typer.Option(help="auto, cpu or gpu.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Local worker processes.")]
Scheduler = Annotated[str | None, typer.Option(help="Address or file of a running Dask scheduler.")]
TlsCa = Annotated[str | None, typer.Option("--tls-ca-file", help="PEM file of the CA of a tls:// scheduler.")]
TlsCert = Annotated[str | None, typer.Option("--tls-cert", help="PEM file of the client's certificate.")]
TlsKey = Annotated[str | None, typer.Option("--tls-key", help="PEM file of the client's private key.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace another run in the output folder.")]
StorageOption = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-option", metavar="KEY=VALUE",
        help="Option of the inputs' store, such as anon=true or client_kwargs.endpoint_url=URL; repeatable.",
    ),
]  # fmt: skip
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the accounting alone.")]


class _StoppedError(ImgcurateError):
    """Ctrl-C during a run; typer would end the process without a word."""


def _version(show: bool) -> None:
    if show:
        import imgcurate

        typer.echo(f"imgcurate {imgcurate.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug messages.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    global _debug
    del version
    _debug = debug
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(name)s: %(message)s")
    if not debug:
        # What Dask says about dying workers is said again, in a line, when it ends the run.
        dask.config.set(logging={"distributed": "critical"})


@app.command(epilog="Example: imgcurate demo -o imgcurate-demo")
def demo(
    output: Annotated[str, typer.Option("-o", "--output", help="Folder for input and output.")] = "imgcurate-demo",
    workers: Workers = None,
    device: Device = "auto",
) -> None:
    """Curate real photos with planted near-duplicates and broken files, and check what was found."""
    from imgcurate.demo import check_demo, make_demo_shards
    from imgcurate.stages import ImageEmbeddingStage, SemanticDedupStage

    folder = Path(output)
    out = folder / "curated"
    mark = folder / ".imgcurate-demo"
    if folder.exists() and any(folder.iterdir()) and not mark.exists():
        raise ConfigError(f"{folder} holds something else than a demo: name another folder with -o")
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
    truth = make_demo_shards(folder / "shards")
    typer.echo(
        f"{truth.samples} samples in 4 shards: {truth.photos} photos, "
        f"{truth.planted} planted near-duplicates, {truth.broken} broken files"
    )
    stages = [ImageEmbeddingStage(model="tiny-image"), SemanticDedupStage(eps=truth.eps)]
    pipeline = _pipeline([str(folder / "shards" / "*.tar")], stages, images_per_tar=100)
    result = _run(pipeline, str(out), device, workers, scheduler=None, overwrite=True, quiet=False)
    found = check_demo(truth, result)
    typer.echo(
        f"found {found.found} of {found.planted} planted near-duplicates, {found.merged} distinct photos merged, "
        f"{found.reported} of {truth.broken} broken files reported"
    )
    typer.echo(f"curated shards: {out}/shards   catalog: {out}/catalog   manifest: {out}/manifest.json")
    typer.echo(result.accounting())


@app.command(epilog="Example: imgcurate curate 'shards/*.tar' -o OUT --min-aesthetic 0.5 --max-nsfw 0.5 --eps 0.05")
def curate(
    inputs: Inputs,
    output: Output,
    encoder: Annotated[str, typer.Option(help="open_clip model; tiny-image (needs no weights); or none.")] = "ViT-L-14",
    pretrained: Annotated[str, typer.Option(help="open_clip tag, or a weights file.")] = "openai",
    model_dir: Annotated[str | None, typer.Option(help="Folder with weights; what is missing is downloaded.")] = None,
    min_aesthetic: Annotated[float | None, typer.Option(min=0, max=1, help="Keep aesthetic_score >= F.")] = None,
    max_nsfw: Annotated[float | None, typer.Option(min=0, max=1, help="Keep nsfw_score < F.")] = None,
    quality: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN=MIN:MAX", help="Keep this range, such as sharpness=100: or width=256:; repeatable."
        ),
    ] = None,
    exact_dedup: Annotated[
        bool, typer.Option("--exact-dedup/--no-exact-dedup", help="Remove images of the same bytes first.")
    ] = False,
    perceptual: Annotated[
        int | None, typer.Option(min=0, max=16, help="Remove images whose pHash differs in at most N of 64 bits.")
    ] = None,
    dedup: Annotated[
        bool | None, typer.Option("--dedup/--no-dedup", help="Remove semantic duplicates; the default with an encoder.")
    ] = None,
    eps: Annotated[float, typer.Option(min=0, max=1, help="Duplicates have a cosine similarity >= 1 - eps.")] = 0.05,
    n_clusters: Annotated[int | None, typer.Option(min=1, help="Clusters for dedup; chosen if not given.")] = None,
    which_to_keep: Annotated[str, typer.Option(help="hard, easy or random: who stays of equals.")] = "hard",
    keep_by: Annotated[
        list[str], typer.Option(help="What decides first who stays; repeatable. '-' prefers the larger.")
    ] = ["-width*height", "-nbytes"],  # noqa: B006 - typer copies it
    reference: Annotated[
        list[str] | None, typer.Option(help="Finished run whose kept samples stay kept; repeatable.")
    ] = None,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Refuse larger images undecoded; 179 Mpx.")] = None,
    max_aspect_ratio: Annotated[float | None, typer.Option(min=1, help="Refuse more elongated images; 50.")] = None,
    min_size: Annotated[int | None, typer.Option(min=1, help="Leave out images with a shorter side.")] = None,
    images_per_tar: Annotated[int, typer.Option(min=1, help="Samples per output shard.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 32,
    files_per_partition: Annotated[int, typer.Option(min=1, help="Shards per partition.")] = 1,
    sidecars: Annotated[
        bool, typer.Option("--sidecars/--no-sidecars", help="Join the Parquet files beside tars, as of img2dataset.")
    ] = True,
    storage_option: StorageOption = None,
    device: Device = "auto",
    workers: Workers = None,
    scheduler: Scheduler = None,
    tls_ca_file: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Curate shards: embed, score, filter, remove duplicates, write what is kept."""
    from imgcurate.config import quality_ranges
    from imgcurate.stages import (
        ExactDedupStage,
        ImageAestheticFilterStage,
        ImageEmbeddingStage,
        ImageNSFWFilterStage,
        ImageQualityFilterStage,
        PerceptualDedupStage,
        SemanticDedupStage,
    )

    stages: list[Any] = []
    hashes = [c for c, asked in ((schema.CONTENT_HASH, exact_dedup), (schema.PHASH, perceptual is not None)) if asked]
    embeds = encoder != "none"
    # Without an encoder these measures are why images are decoded, so that broken ones are found.
    if quality or hashes or not embeds:
        columns = hashes if hashes and not quality else None
        ranges = quality_ranges(quality or [])
        try:
            stages.append(ImageQualityFilterStage(ranges, columns=columns))
        except ConfigError as exc:
            raise ConfigError(f"--quality: {str(exc).removeprefix('ranges: ')}") from exc
    if embeds:
        stages.append(ImageEmbeddingStage(encoder, pretrained, model_dir, model_inference_batch_size=batch_size))
    if min_aesthetic is not None:
        stages.append(ImageAestheticFilterStage(min_aesthetic, model_dir))
    if max_nsfw is not None:
        stages.append(ImageNSFWFilterStage(max_nsfw, model_dir))
    if exact_dedup:
        stages.append(ExactDedupStage(keep_by=keep_by))
    if perceptual is not None:
        stages.append(PerceptualDedupStage(perceptual, keep_by=keep_by))
    if embeds if dedup is None else dedup:
        stages.append(
            SemanticDedupStage(
                eps=eps, n_clusters=n_clusters if n_clusters is not None else "auto", which_to_keep=which_to_keep,
                keep_by=keep_by, reference=reference or (),
            )
        )  # fmt: skip
    limits = {"max_pixels": max_pixels, "max_aspect_ratio": max_aspect_ratio, "min_size": min_size}
    limits = {k: v for k, v in limits.items() if v is not None}
    pipeline = _pipeline(
        inputs, stages, images_per_tar, files_per_partition, batch_size, storage_option or [], sidecars, **limits
    )
    result = _run(
        pipeline, output, device, workers, scheduler, overwrite, quiet, (tls_ca_file, tls_cert, tls_key)
    )  # fmt: skip
    typer.echo(result.accounting())


@app.command(epilog="Example: imgcurate run pipeline.yaml -o OUT")
def run(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE.yaml", help="Inputs and stages.")],
    output: Output,
    device: Annotated[str | None, typer.Option(help="auto, cpu or gpu; overrides the file.")] = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    tls_ca_file: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Run a pipeline that a YAML file describes."""
    from imgcurate.config import load_config

    config = load_config(pipeline)
    if config.imports_stages:
        # They are imported from where the command runs, as Python does it; nothing else is.
        sys.path.insert(0, str(Path.cwd()))
    result = _run(
        config.pipeline(), output, device or config.device, workers or config.workers,
        scheduler or config.scheduler, overwrite, quiet, (tls_ca_file, tls_cert, tls_key),
    )  # fmt: skip
    typer.echo(result.accounting())


@app.command(epilog="Example: imgcurate dedup embeddings.parquet -o OUT --id-field id --eps 0.05")
def dedup(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="EMBEDDINGS...", help="Parquet, npy, folders of these or of clip-retrieval, globs."),
    ],
    output: Output,
    id_field: Annotated[str, typer.Option(help="Column of ids: integers, strings or bytes.")] = "id",
    embedding_field: Annotated[str, typer.Option(help="Column of lists of numbers.")] = "embedding",
    eps: Annotated[float, typer.Option(min=0, max=1, help="Duplicates have a cosine similarity >= 1 - eps.")] = 0.05,
    eps_list: Annotated[list[float] | None, typer.Option(help="Count for this eps too; repeatable.")] = None,
    n_clusters: Annotated[int | None, typer.Option(min=1, help="k-means clusters; chosen if not given.")] = None,
    n_probe: Annotated[int, typer.Option(min=1, help="Clusters in which a row is looked for.")] = 2,
    max_probe: Annotated[int, typer.Option(min=1, help="Up to so many where a near row is likely.")] = 8,
    which_to_keep: Annotated[str, typer.Option(help="hard, easy or random: who stays of equals.")] = "hard",
    keep_by: Annotated[
        list[str] | None, typer.Option(help="Column that decides first who stays; repeatable. '-' prefers the larger.")
    ] = None,
    mode: Annotated[str, typer.Option(help="representatives, or semdedup: the published rule.")] = "representatives",
    reference: Annotated[
        list[str] | None, typer.Option(help="Embeddings whose rows stay in any case; repeatable.")
    ] = None,
    only_reference: Annotated[
        bool, typer.Option("--only-reference", help="Compare with the reference alone, as for an evaluation set.")
    ] = False,
    storage_option: StorageOption = None,
    device: Device = "auto",
    workers: Workers = None,
    scheduler: Scheduler = None,
    tls_ca_file: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Remove duplicates among embeddings of any source: which ids stay, and what the others duplicate."""
    from imgcurate.config import storage_options
    from imgcurate.standalone import dedup_embeddings

    try:
        with show_progress(quiet) as progress:
            result = dedup_embeddings(
                inputs, output, id_field=id_field, embedding_field=embedding_field, eps=eps,
                eps_list=eps_list or (), n_clusters=n_clusters or "auto", n_probe=n_probe, max_probe=max_probe,
                which_to_keep=which_to_keep, keep_by=keep_by or (), mode=mode, reference=reference or (),
                only_reference=only_reference, storage_options=storage_options(storage_option or []),
                scheduler=scheduler, security=_security(scheduler, (tls_ca_file, tls_cert, tls_key)),
                device=device, n_workers=workers, overwrite=overwrite, progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt as exc:
        raise _StoppedError from exc
    typer.echo(result.accounting())


@app.command(epilog="Example: imgcurate inspect 'shards/*.tar'")
def inspect(
    inputs: Inputs,
    storage_option: StorageOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object.")] = False,
) -> None:
    """Show what is in shards, without decoding: samples, members, sizes, problems."""
    from imgcurate.config import storage_options
    from imgcurate.inspection import inspect_shards

    report = inspect_shards(inputs, storage_options=storage_options(storage_option or []))
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=1))
        return
    console = Console()
    table = Table("shard", *(c for c in ("samples", "ok", "members", "bytes", "problems")))
    for shard in report.shards[:_MAX_SHARD_ROWS]:
        numbers = (f"{n:,}" for n in (shard.samples, shard.ok, shard.members, shard.nbytes))
        table.add_row(
            escape(printable(shard.url)), *numbers, ", ".join(f"{n} {kind}" for kind, n in shard.problems.items())
        )
    console.print(table)
    if len(report.shards) > _MAX_SHARD_ROWS:
        typer.echo(f"... and {len(report.shards) - _MAX_SHARD_ROWS:,} more shards")
    for line in report.details[:_MAX_PROBLEM_ROWS]:
        typer.echo(printable(line))
    if len(report.details) > _MAX_PROBLEM_ROWS:
        typer.echo(f"... and {len(report.details) - _MAX_PROBLEM_ROWS:,} more problems (--json shows all)")
    members = [f"{n:,} {printable(ext)}" for ext, n in report.extensions.items()]
    if len(members) > _MAX_EXTENSIONS:
        members[_MAX_EXTENSIONS:] = [f"and {len(members) - _MAX_EXTENSIONS:,} more extensions"]
    typer.echo("members: " + (", ".join(members) or "none"))
    typer.echo(report.summary())


@app.command(epilog="Example: imgcurate verify OUT")
def verify(
    output: Annotated[str, typer.Argument(metavar="OUT", help="Output folder of a run.")],
    quick: Annotated[bool, typer.Option("--quick", help="Leave the inputs alone.")] = False,
    storage_option: StorageOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object.")] = False,
    workers: Workers = None,
    scheduler: Scheduler = None,
    quiet: Quiet = False,
) -> None:
    """Prove that a run is whole, and that every byte is as in its input. Exit code 1 if not."""
    from imgcurate.config import storage_options
    from imgcurate.verification import verify_run

    options = storage_options(storage_option or [])
    with show_progress(quiet or as_json) as progress:
        done = verify_run(
            output, storage_options=options, quick=quick, scheduler=scheduler, n_workers=workers, progress=progress
        )
    typer.echo(json.dumps(done.as_dict(), indent=1) if as_json else "\n".join(done.lines(_MAX_PROBLEM_ROWS)))
    if not done.ok:
        raise typer.Exit(1)


def _pipeline(
    inputs: list[str],
    stages: list[Any],
    images_per_tar: int,
    files_per_partition: int = 1,
    batch_size: int = 32,
    storage_option: Sequence[str] = (),
    sidecars: bool = True,
    **limits: Any,
) -> Any:
    from imgcurate.config import storage_options
    from imgcurate.pipeline import Pipeline
    from imgcurate.stages import FilePartitioningStage, ImageReaderStage, ImageWriterStage

    return Pipeline(
        [
            FilePartitioningStage(
                inputs, files_per_partition, storage_options(storage_option), "auto" if sidecars else ()
            ),
            ImageReaderStage(dali_batch_size=batch_size, **limits),
            *stages,
            ImageWriterStage(images_per_tar=images_per_tar),
        ]
    )


def _run(
    pipeline: Any,
    output: str,
    device: str,
    workers: int | None,
    scheduler: str | None,
    overwrite: bool,
    quiet: bool,
    tls: tuple[str | None, str | None, str | None] = (None, None, None),
) -> Any:
    from imgcurate.backend import get_backend, why_no_gpu

    pipeline.plan()
    security = _security(scheduler, tls)
    if scheduler is None:
        backend = get_backend(device)
        if device == "auto" and not backend.is_gpu and not quiet:
            typer.echo(f"running on the CPU: {why_no_gpu()}", err=True)
    try:
        with show_progress(quiet) as progress:
            result = pipeline.run(
                output, scheduler=scheduler, security=security, device=device, n_workers=workers,
                overwrite=overwrite, progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt as exc:
        raise _StoppedError from exc
    if not quiet and not result.shards:
        why = "nothing was kept" if not result.kept else "the pipeline has no ImageWriterStage"
        typer.echo(f"no shards were written: {why}", err=True)
    return result


def _security(scheduler: str | None, tls: tuple[str | None, str | None, str | None]) -> Any:
    from imgcurate.cluster import tls_security

    if scheduler is None and any(tls):
        raise ConfigError("--tls-ca-file, --tls-cert and --tls-key go with --scheduler")
    return tls_security(*tls)


def main() -> None:
    """Run the command line: exit code 0 done, 1 the run failed, 2 wrong usage or configuration."""
    try:
        app()
    except _StoppedError:
        _fail("stopped", "run the same command again to go on", 1)
    except ImgcurateError as exc:
        _fail("wrong usage" if isinstance(exc, ConfigError) else "failed", str(exc), exc.exit_code)
    except Exception as exc:  # noqa: BLE001 - the last resort: one line, a traceback with --debug
        hint = "" if _debug else " (imgcurate --debug ... shows where)"
        _fail("failed", f"{type(exc).__name__}: {exc}{hint}", 1)


def _fail(kind: str, message: str, exit_code: int) -> NoReturn:
    """Say in one line why the command ends."""
    if _debug:
        traceback.print_exc()
    words = printable(" ".join(message.split()))
    if len(words) > _MAX_MESSAGE:
        words = f"{words[:_MAX_MESSAGE]} ..."
    typer.echo(f"imgcurate: {kind}: {words}", err=True)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
