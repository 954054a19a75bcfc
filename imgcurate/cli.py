"""The command line, and nothing else: what makes runs; :mod:`imgcurate.commands` has what looks at them."""

from __future__ import annotations

import logging
import signal
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import dask
import typer

from imgcurate import commands, preparing, schema
from imgcurate.console import (
    Caption,
    Device,
    DryRun,
    EpsList,
    Inputs,
    IsIn,
    IsNotIn,
    Json,
    Keep,
    LogJson,
    MaxFailed,
    MinCaption,
    OnlyReference,
    Output,
    Overwrite,
    Performance,
    Quiet,
    Report,
    Resume,
    RetryFailed,
    Scheduler,
    StoppedError,
    StorageOption,
    TlsCa,
    TlsCert,
    TlsKey,
    Where,
    Workers,
    ZeroShot,
    ZeroShotRange,
    app,
    one_of,
    refuse_options,
    run_command,
    show_estimate,
    show_result,
)
from imgcurate.errors import ConfigError, ImgcurateError, printable

__all__ = ["app", "commands", "main", "preparing"]

_debug = False
_MAX_MESSAGE: Final = 2000


def _version(show: bool) -> None:
    if show:
        import imgcurate

        typer.echo(f"imgcurate {imgcurate.__version__}")
        raise typer.Exit


def _batch_size(text: str) -> int | str:
    """Read the option ``--batch-size``."""
    if text == "auto" or (text.isascii() and text.isdigit() and int(text) > 0):
        return text if text == "auto" else int(text)
    raise typer.BadParameter(f"{text!r} is neither a whole number from 1 on nor auto")


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
        dask.config.set(logging={"distributed": "critical", "distributed.client": "critical"})


@app.command(
    short_help="Curate real photos with planted duplicates, and check.",
    epilog="Example: imgcurate demo -o imgcurate-demo",
)
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
    pipeline.plan()
    result = run_command(
        partial(pipeline.run, str(out)), device=device, n_workers=workers, scheduler=None, tls=(None,) * 3,
        overwrite=True, quiet=False,
    )  # fmt: skip
    found = check_demo(truth, result)
    typer.echo(
        f"found {found.found} of {found.planted} planted near-duplicates, {found.merged} distinct photos merged, "
        f"{found.reported} of {truth.broken} broken files reported"
    )
    typer.echo(f"curated shards: {out}/shards   catalog: {out}/catalog   report: {out}/report.html")
    typer.echo(result.accounting())


@app.command(
    short_help="Embed, score, filter, remove duplicates, write shards.",
    epilog="Example: imgcurate curate 'shards/*.tar' -o OUT --min-aesthetic 0.5 --max-nsfw 0.5 --eps 0.05",
)
def curate(
    ctx: typer.Context,
    inputs: Inputs,
    output: Output,
    encoder: Annotated[str, typer.Option(help="open_clip model; tiny-image (needs no weights); or none.")] = "ViT-L-14",
    pretrained: Annotated[str, typer.Option(help="open_clip tag, or a weights file.")] = "openai",
    model_dir: Annotated[str | None, typer.Option(help="Folder with weights; what is missing is downloaded.")] = None,
    min_aesthetic: Annotated[float | None, typer.Option(min=0, max=1, help="Keep aesthetic_score >= F.")] = None,
    max_nsfw: Annotated[float | None, typer.Option(min=0, max=1, help="Keep nsfw_score < F.")] = None,
    min_caption_similarity: MinCaption = None,
    caption: Caption = None,
    zero_shot: ZeroShot = None,
    zero_shot_range: ZeroShotRange = None,
    where: Where = None,
    is_in: IsIn = None,
    is_not_in: IsNotIn = None,
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
    eps_list: EpsList = None,
    which_to_keep: Keep = "hard",
    keep_by: Annotated[
        list[str], typer.Option(help="What decides first who stays; repeatable. '-' prefers the larger.")
    ] = [*schema.LARGEST_FIRST],  # noqa: B006 - typer copies it
    reference: Annotated[
        list[str] | None, typer.Option(help="Finished run whose kept samples stay kept; repeatable.")
    ] = None,
    only_reference: OnlyReference = False,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Refuse larger images undecoded; 179 Mpx.")] = None,
    max_aspect_ratio: Annotated[float | None, typer.Option(min=1, help="Refuse more elongated images; 50.")] = None,
    min_size: Annotated[int | None, typer.Option(min=1, help="Leave out images with a shorter side.")] = None,
    images_per_tar: Annotated[int, typer.Option(min=1, help="Samples per output shard.")] = 1000,
    batch_size: Annotated[
        Any,
        typer.Option(parser=_batch_size, metavar="N|auto", help="Images per batch; auto: 32, or 256 on GPUs."),
    ] = "auto",
    files_per_partition: Annotated[
        int | None, typer.Option(min=1, help="Shards per partition. [default: 1, tiny ones together]")
    ] = None,
    sidecars: Annotated[
        bool, typer.Option("--sidecars/--no-sidecars", help="Join the Parquet files beside tars, as of img2dataset.")
    ] = True,
    skip_dropped: Annotated[
        bool, typer.Option("--skip-dropped", help="Embed only what --quality, --where, --is-in and the like keep.")
    ] = False,
    text_column: Annotated[
        list[str] | None,
        typer.Option(metavar="EXT", help="Make a column of the members .EXT, such as txt or json; repeatable."),
    ] = None,
    json_column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY[:KIND]",
            help="Make a column of a key in the members .json; KIND: number, integer, text, boolean; repeatable.",
        ),
    ] = None,
    storage_option: StorageOption = None,
    device: Device = "auto",
    workers: Workers = None,
    scheduler: Scheduler = None,
    tls_ca_file: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    max_failed: MaxFailed = None,
    retry_failed: RetryFailed = False,
    report: Report = None,
    log_json: LogJson = None,
    performance_report: Performance = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Curate shards: embed, score, filter, remove duplicates, write what is kept."""
    from imgcurate.options import caption_options, column_options, json_columns, quality_ranges, zero_shot_options
    from imgcurate.stages import (
        ColumnFilterStage,
        ExactDedupStage,
        ImageAestheticFilterStage,
        ImageCaptionFilterStage,
        ImageEmbeddingStage,
        ImageNSFWFilterStage,
        ImageQualityFilterStage,
        ImageZeroShotFilterStage,
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
        stages.append(
            ImageEmbeddingStage(
                encoder, pretrained, model_dir, model_inference_batch_size=batch_size, skip_dropped=skip_dropped
            )
        )
    elif skip_dropped:
        raise ConfigError("--skip-dropped spares the encoder what others drop: it needs an --encoder")
    if min_aesthetic is not None:
        stages.append(ImageAestheticFilterStage(min_aesthetic, model_dir))
    if max_nsfw is not None:
        stages.append(ImageNSFWFilterStage(max_nsfw, model_dir))
    captions = caption_options(min_caption_similarity, caption)
    model: dict[str, Any] = {"model": encoder, "pretrained": pretrained, "model_dir": model_dir}
    texts = list(text_column or [])
    prompts = zero_shot_options(zero_shot or [], zero_shot_range or [])
    if not embeds and (captions or prompts):
        raise ConfigError("captions and prompts are compared with embeddings: these options need an --encoder")
    if captions:
        stages.append(ImageCaptionFilterStage(**captions, **model, model_inference_batch_size=batch_size))
        # Other columns are those of sidecars, or of members that --text-column names.
        texts += ({stages[-1].text_column} & {"txt", "json"}) - set(texts)
    if prompts:
        stages.append(ImageZeroShotFilterStage(**{"labels": {}, **prompts, **model}))
    if by_columns := column_options(where, is_in, is_not_in):
        _add_column_filter(stages, ColumnFilterStage(**by_columns))
    if exact_dedup:
        stages.append(ExactDedupStage(keep_by=keep_by))
    if perceptual is not None:
        stages.append(PerceptualDedupStage(perceptual, keep_by=keep_by))
    dedups = embeds if dedup is None else dedup
    if not dedups:
        # Beside --no-dedup thresholds may stay in a command; what was to be compared with, or counted, may not.
        moot = ["reference", "only_reference", "eps_list", *([] if dedup is False else ["eps", "n_clusters"])]
        moot += [] if dedup is False or exact_dedup or perceptual is not None else ["which_to_keep", "keep_by"]
        refuse_options(ctx, moot, "does nothing without semantic deduplication, which takes an --encoder, and --dedup")
    if dedups:
        stages.append(
            SemanticDedupStage(
                eps=eps, n_clusters=n_clusters if n_clusters is not None else "auto", which_to_keep=which_to_keep,
                keep_by=keep_by, reference=reference or (), only_reference=only_reference, eps_list=eps_list or (),
            )
        )  # fmt: skip
    limits = {"max_pixels": max_pixels, "max_aspect_ratio": max_aspect_ratio, "min_size": min_size}
    limits = {k: v for k, v in limits.items() if v is not None}
    reading = {"text_columns": texts, "json_columns": json_columns(json_column or []), **limits}
    pipeline = _pipeline(
        inputs, stages, images_per_tar, files_per_partition, batch_size, storage_option or [], sidecars, **reading
    )
    _execute(
        pipeline, output, dry_run=dry_run, as_json=as_json, quiet=quiet, device=device, n_workers=workers,
        scheduler=scheduler, tls=(tls_ca_file, tls_cert, tls_key), overwrite=overwrite, resume=resume,
        max_failed=max_failed or 0, retry_failed=retry_failed, report=report, log=log_json,
        performance_report=performance_report,
    )  # fmt: skip


def _add_column_filter(stages: list[Any], columns: Any) -> None:
    """Put a filter on columns where they are there: before an encoder that is spared what it drops, if it can be."""
    at = next((i for i, stage in enumerate(stages) if stage.skip_dropped), len(stages))
    made = {column for stage in stages[at:] for column in stage.adds}
    stages.insert(len(stages) if made & set(columns.needs) else at, columns)


@app.command(epilog="Example: imgcurate run pipeline.yaml -o OUT --set stages.SemanticDedupStage.eps=0.03")
def run(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE.yaml", help="Inputs and stages.")],
    output: Output,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="In place of what the file says; repeatable."),
    ] = None,
    device: Annotated[str | None, one_of("auto", "cpu", "gpu", help="As in the file, if not given.")] = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    tls_ca_file: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    max_failed: MaxFailed = None,
    retry_failed: RetryFailed = False,
    report: Report = None,
    log_json: LogJson = None,
    performance_report: Performance = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a pipeline that a YAML file describes."""
    from imgcurate.config import load_config

    config = load_config(pipeline, overrides or ())
    if config.imports_stages:
        # They are imported from where the command runs, as Python does it; nothing else is.
        sys.path.insert(0, str(Path.cwd()))
    _execute(
        config.pipeline(), output, dry_run=dry_run, as_json=as_json, quiet=quiet, device=device or config.device,
        n_workers=workers or config.workers, scheduler=scheduler or config.scheduler,
        tls=(tls_ca_file, tls_cert, tls_key), overwrite=overwrite, resume=resume, retry_failed=retry_failed,
        max_failed=max_failed if max_failed is not None else config.max_failed, report=report, log=log_json,
        performance_report=performance_report,
    )  # fmt: skip


def _execute(
    pipeline: Any, output: str, *, dry_run: bool, as_json: bool, quiet: bool, device: str, n_workers: int | None,
    **options: Any,
) -> None:  # fmt: skip
    """Run a pipeline, or say what it would do."""
    pipeline.plan()
    if dry_run:
        show_estimate(pipeline, output, device=device, n_workers=n_workers, as_json=as_json)
        return
    result = run_command(
        partial(pipeline.run, output), device=device, n_workers=n_workers, quiet=quiet or as_json, **options
    )
    show_result(result, as_json)


def _pipeline(
    inputs: list[str],
    stages: list[Any],
    images_per_tar: int,
    files_per_partition: int | None = None,
    batch_size: Any = "auto",
    storage_option: Sequence[str] = (),
    sidecars: bool = True,
    **reading: Any,
) -> Any:
    from imgcurate.options import storage_options
    from imgcurate.pipeline import Pipeline
    from imgcurate.stages import FilePartitioningStage, ImageReaderStage, ImageWriterStage

    return Pipeline(
        [
            FilePartitioningStage(
                inputs, files_per_partition, storage_options(storage_option), "auto" if sidecars else ()
            ),
            ImageReaderStage(dali_batch_size=batch_size, **reading),
            *stages,
            ImageWriterStage(images_per_tar=images_per_tar),
        ]
    )


def main() -> None:
    """Run the command line: exit code 0 done, 1 the run failed, 2 wrong usage; 130 Ctrl-C, 143 SIGTERM."""
    try:
        app()
    except StoppedError as exc:
        # What Python and Dask do at the end is not to be stopped in the middle.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _fail("stopped", "run the same command again to go on", exc.exit_code)
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
