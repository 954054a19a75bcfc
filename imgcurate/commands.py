"""The commands that look at inputs and at what runs left: ``report refilter export search dedup inspect verify``."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated, Any, Final

import typer
from rich.markup import escape
from rich.table import Table

from imgcurate import schema
from imgcurate.console import (
    Caption,
    Device,
    EpsList,
    Inputs,
    IsIn,
    IsNotIn,
    Json,
    Keep,
    MinCaption,
    OnlyReference,
    Output,
    Overwrite,
    Quiet,
    Report,
    Resume,
    Scheduler,
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
    running,
    security,
    show_result,
    show_table,
)
from imgcurate.errors import printable

__all__ = ["dedup", "export", "inspect", "refilter", "report", "search", "verify"]

_MAX_SHARD_ROWS: Final = 50
_MAX_PROBLEM_ROWS: Final = 20
_MAX_EXTENSIONS: Final = 30


@app.command(
    short_help="Decide a finished run anew; no image is decoded.",
    epilog="Example: imgcurate refilter OUT -o OUT2 --min-aesthetic 0.55 --eps 0.03",
)
def refilter(
    ctx: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help="Output folder of a finished run.")],
    output: Output,
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
        list[str] | None, typer.Option(metavar="COLUMN=MIN:MAX", help="Keep these ranges, and no others; repeatable.")
    ] = None,
    exact_dedup: Annotated[bool | None, typer.Option(help="Remove images of the same bytes, or not.")] = None,
    perceptual: Annotated[
        int | None, typer.Option(min=0, max=16, help="pHashes of duplicates differ in N bits.")
    ] = None,
    no_perceptual: Annotated[bool, typer.Option("--no-perceptual", help="Leave perceptual dedup out.")] = False,
    dedup: Annotated[bool | None, typer.Option(help="Remove semantic duplicates, or not.")] = None,
    eps: Annotated[float | None, typer.Option(min=0, max=1, help="Duplicates have a cosine >= 1 - eps.")] = None,
    n_clusters: Annotated[int | None, typer.Option(min=1, help="Clusters for dedup.")] = None,
    eps_list: EpsList = None,
    which_to_keep: Annotated[str | None, one_of("hard", "easy", "random", help="Who stays of equals.")] = None,
    keep_by: Annotated[list[str] | None, typer.Option(help="What decides first who stays; repeatable.")] = None,
    reference: Annotated[list[str] | None, typer.Option(help="Run whose kept samples stay kept; repeatable.")] = None,
    only_reference: OnlyReference = False,
    images_per_tar: Annotated[int | None, typer.Option(min=1, help="Samples per output shard.")] = None,
    model_dir: Annotated[
        str | None, typer.Option(help="Folder with weights of what is computed. [default: that of the run]")
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
    report: Report = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Decide a finished run anew, without decoding an image: what is not given stays as it was."""
    from imgcurate.options import caption_options, column_options, quality_ranges, storage_options, zero_shot_options
    from imgcurate.refiltering import refilter as decide
    from imgcurate.refiltering import stages_of

    if dedup is False:
        moot = ["eps", "n_clusters", "eps_list", "which_to_keep", "reference", "only_reference"]
        refuse_options(ctx, moot, "does nothing beside --no-dedup")
    if no_perceptual:
        refuse_options(ctx, ["perceptual"], "does nothing beside --no-perceptual")
    changes: dict[str, dict[str, Any]] = {
        "ImageAestheticFilterStage": {"score_threshold": min_aesthetic},
        "ImageNSFWFilterStage": {"score_threshold": max_nsfw},
        "ImageCaptionFilterStage": caption_options(min_caption_similarity, caption),
        "ImageZeroShotFilterStage": zero_shot_options(zero_shot or [], zero_shot_range or []),
        "ColumnFilterStage": column_options(where, is_in, is_not_in),
        "ImageQualityFilterStage": {"ranges": quality_ranges(quality) if quality else None},
        "ExactDedupStage": {"keep_by": keep_by if exact_dedup else None},
        "PerceptualDedupStage": {
            "max_distance": perceptual, "keep_by": keep_by if perceptual is not None else None,
        },
        "SemanticDedupStage": {
            "eps": eps, "n_clusters": n_clusters, "which_to_keep": which_to_keep, "keep_by": keep_by,
            "reference": reference, "only_reference": only_reference or None, "eps_list": eps_list,
        },
        "ImageWriterStage": {"images_per_tar": images_per_tar},
    }  # fmt: skip
    given: dict[str, dict[str, Any] | None] = {}
    asked = {"ExactDedupStage": exact_dedup, "SemanticDedupStage": dedup}
    for stage, params in changes.items():
        some = {k: v for k, v in params.items() if v is not None}
        if some or asked.get(stage):
            given[stage] = some
    given |= {stage: None for stage, wanted in asked.items() if wanted is False}
    if no_perceptual:
        given["PerceptualDedupStage"] = None
    if (semantic := given.get("SemanticDedupStage")) is not None and "SemanticDedupStage" not in stages_of(run):
        # It is added, as `curate` would have had it.
        semantic.setdefault("keep_by", [*schema.LARGEST_FIRST])
    result = run_command(
        partial(decide, run, output, given, model_dir=model_dir, storage_options=storage_options(storage_option or [])),
        device=device, n_workers=workers, scheduler=scheduler, tls=(tls_ca_file, tls_cert, tls_key),
        overwrite=overwrite, resume=resume, report=report, quiet=quiet or as_json,
    )  # fmt: skip
    show_result(result, as_json)


@app.command(
    short_help="Make the report again: a page with pictures.",
    epilog="Example: imgcurate report OUT --output report.html",
)
def report(
    run: Annotated[str, typer.Argument(metavar="OUT", help="Output folder of a finished run.")],
    output: Annotated[str | None, typer.Option("-o", "--output", help="The page. [default: OUT/report.html]")] = None,
    show_nsfw: Annotated[
        bool, typer.Option("--show-nsfw", help="Do not blur pictures with a high nsfw_score.")
    ] = False,
    groups: Annotated[int, typer.Option(min=1, max=1000, help="Groups of duplicates to show of each kind.")] = 10,
    storage_option: StorageOption = None,
) -> None:
    """Make the report of a run again: one HTML page with pictures of what stayed and what left."""
    from imgcurate.options import storage_options
    from imgcurate.report import make_report

    options = storage_options(storage_option or [])
    typer.echo(make_report(run, output, show_nsfw=show_nsfw, groups=groups, storage_options=options))


@app.command(
    short_help="Write Parquet, CSV, npy or clip-retrieval's folders.",
    epilog="Example: imgcurate export OUT -o TABLES --format kept --format clip-retrieval",
)
def export(
    run: Annotated[str, typer.Argument(metavar="OUT", help="Output folder of a finished run.")],
    output: Annotated[str, typer.Option("-o", "--output", help="Folder for the files.")],
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            autocompletion=lambda: ["kept", "removed", "npy", "clip-retrieval"],
            help="kept, removed, npy or clip-retrieval; repeatable. [default: kept, removed]",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write what a run decided as files that other tools read: Parquet, CSV, npy, clip-retrieval's folders."""
    from imgcurate.exchange_files import export_run

    written = export_run(run, output, formats or ("kept", "removed"))
    if as_json:
        typer.echo(json.dumps({"output": output, "rows": written}, indent=1))
        return
    for name, rows in written.items():
        typer.echo(f"{name}: {rows:,} rows{' (nothing was kept)' if not rows and name != 'removed' else ''}")


@app.command(
    short_help="Find samples of a run by a text or a picture.",
    epilog="Example: imgcurate search OUT 'a red dress' --page hits.html",
)
def search(
    run: Annotated[str, typer.Argument(metavar="OUT", help="Output folder of a finished run.")],
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="What the samples should show.")] = None,
    image: Annotated[str | None, typer.Option(help="Picture that they should be like.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 20,
    dropped: Annotated[bool, typer.Option("--dropped", help="Look among the samples that left too.")] = False,
    page: Annotated[str | None, typer.Option(help="Write a page with their pictures.")] = None,
    model_dir: Annotated[str | None, typer.Option(help="Folder with the weights. [default: that of the run]")] = None,
    storage_option: StorageOption = None,
    as_json: Json = False,
) -> None:
    """Find the samples of a run that are nearest to a text, a picture, or the mean of both."""
    from imgcurate.options import storage_options
    from imgcurate.searching import search as find

    options = storage_options(storage_option or [])
    found = find(run, text, image=image, n=n, dropped=dropped, page=page, model_dir=model_dir, storage_options=options)
    if as_json:
        typer.echo(found.to_json(orient="records", indent=1))
        return
    table = Table()
    for name in ("similarity", "key", "shard", *(["status"] if dropped else [])):
        table.add_column(name, overflow="fold")
    for _, row in found.iterrows():
        cells = (f"{row[schema.SIMILARITY]:.3f}", row[schema.KEY], row[schema.SHARD], *([row[schema.STATUS]] * dropped))
        table.add_row(*(escape(printable(str(cell))) for cell in cells))
    show_table(table)
    if page is not None:
        typer.echo(page)


@app.command(
    short_help="Remove duplicates among embeddings of any source.",
    epilog="Example: imgcurate dedup embeddings.parquet -o OUT --id-field id --eps 0.05",
)
def dedup(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="EMBEDDINGS...", help="Parquet, npy, folders of these or of clip-retrieval, globs."),
    ],
    output: Output,
    id_field: Annotated[str, typer.Option(help="Column of ids: integers, strings or bytes.")] = "id",
    embedding_field: Annotated[str, typer.Option(help="Column of lists of numbers.")] = "embedding",
    eps: Annotated[float, typer.Option(min=0, max=1, help="Duplicates have a cosine similarity >= 1 - eps.")] = 0.05,
    eps_list: EpsList = None,
    n_clusters: Annotated[int | None, typer.Option(min=1, help="k-means clusters; chosen if not given.")] = None,
    n_probe: Annotated[int, typer.Option(min=1, help="Clusters in which a row is looked for.")] = 2,
    max_probe: Annotated[int, typer.Option(min=1, help="Up to so many where a near row is likely.")] = 8,
    which_to_keep: Keep = "hard",
    keep_by: Annotated[
        list[str] | None, typer.Option(help="Column that decides first who stays; repeatable. '-' prefers the larger.")
    ] = None,
    mode: Annotated[
        str, one_of("representatives", "semdedup", help="semdedup is the published rule.")
    ] = "representatives",
    reference: Annotated[
        list[str] | None, typer.Option(help="Embeddings whose rows stay in any case; repeatable.")
    ] = None,
    only_reference: OnlyReference = False,
    storage_option: StorageOption = None,
    device: Device = "auto",
    workers: Workers = None,
    scheduler: Scheduler = None,
    tls_ca_file: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove duplicates among embeddings of any source: which ids stay, and what the others duplicate."""
    from imgcurate.options import storage_options
    from imgcurate.standalone import dedup_embeddings

    with running(quiet or as_json) as progress:
        result = dedup_embeddings(
            inputs, output, id_field=id_field, embedding_field=embedding_field, eps=eps,
            eps_list=eps_list or (), n_clusters=n_clusters or "auto", n_probe=n_probe, max_probe=max_probe,
            which_to_keep=which_to_keep, keep_by=keep_by or (), mode=mode, reference=reference or (),
            only_reference=only_reference, storage_options=storage_options(storage_option or []),
            scheduler=scheduler, security=security(scheduler, (tls_ca_file, tls_cert, tls_key)),
            device=device, n_workers=workers, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    if not quiet and not as_json:
        typer.echo(f"kept.parquet and removed.parquet are in {result.output_dir}", err=True)
    typer.echo(json.dumps(result.as_dict(), indent=1) if as_json else result.accounting())


@app.command(short_help="Show what is in shards, without decoding.", epilog="Example: imgcurate inspect 'shards/*.tar'")
def inspect(
    inputs: Inputs,
    storage_option: StorageOption = None,
    as_json: Json = False,
) -> None:
    """Show what is in shards, without decoding: samples, members, sizes, problems."""
    from imgcurate.inspection import inspect_shards
    from imgcurate.options import storage_options

    report = inspect_shards(inputs, storage_options=storage_options(storage_option or []))
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=1))
        return
    table = Table()
    table.add_column("shard", overflow="fold")
    for name in ("samples", "with image", "members", "bytes", "problems"):
        table.add_column(name)
    for shard in report.shards[:_MAX_SHARD_ROWS]:
        numbers = (f"{n:,}" for n in (shard.samples, shard.ok, shard.members, shard.nbytes))
        table.add_row(
            escape(printable(shard.url)), *numbers, ", ".join(f"{n} {kind}" for kind, n in shard.problems.items())
        )
    show_table(table)
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


@app.command(short_help="Prove that a run is whole, byte for byte.", epilog="Example: imgcurate verify OUT")
def verify(
    output: Annotated[str, typer.Argument(metavar="OUT", help="Output folder of a run.")],
    quick: Annotated[bool, typer.Option("--quick", help="Leave the inputs alone.")] = False,
    storage_option: StorageOption = None,
    as_json: Json = False,
    workers: Workers = None,
    scheduler: Scheduler = None,
    tls_ca_file: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    quiet: Quiet = False,
) -> None:
    """Prove that a run is whole, and that every byte is as in its input. Exit code 1 if not."""
    from imgcurate.options import storage_options
    from imgcurate.verification import verify_run

    options = storage_options(storage_option or [])
    with running(quiet or as_json) as progress:
        done = verify_run(
            output, storage_options=options, quick=quick, scheduler=scheduler, n_workers=workers, progress=progress,
            security=security(scheduler, (tls_ca_file, tls_cert, tls_key)),
        )  # fmt: skip
    typer.echo(json.dumps(done.as_dict(), indent=1) if as_json else "\n".join(done.lines(_MAX_PROBLEM_ROWS)))
    if not done.ok:
        raise typer.Exit(1)
