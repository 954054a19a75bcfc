"""What the commands share: their options, how they show progress, how they end."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from imgcurate import schema
from imgcurate.errors import ConfigError, ImgcurateError, printable
from imgcurate.progress import show_progress

__all__ = [
    "Caption",
    "Device",
    "DryRun",
    "EpsList",
    "Inputs",
    "IsIn",
    "IsNotIn",
    "Json",
    "Keep",
    "LogJson",
    "MaxFailed",
    "MinCaption",
    "OnlyReference",
    "Output",
    "Overwrite",
    "Performance",
    "Quiet",
    "Report",
    "Resume",
    "RetryFailed",
    "Scheduler",
    "StoppedError",
    "StorageOption",
    "Tls",
    "TlsCa",
    "TlsCert",
    "TlsKey",
    "Where",
    "Workers",
    "ZeroShot",
    "ZeroShotRange",
    "app",
    "one_of",
    "refuse_options",
    "run_command",
    "running",
    "security",
    "show_estimate",
    "show_result",
    "show_table",
]

_FILE_COLUMNS: Final = 400
_ORDER: Final = tuple("demo init curate run report refilter export search verify inspect dedup doctor schema".split())


class _InOrder(TyperGroup):
    """The commands in the order in which they are needed."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=_ORDER.index)


app = typer.Typer(
    name="imgcurate",
    cls=_InOrder,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Curate image data sets in WebDataset shards: embed, score, filter, remove duplicates, write shards.",
)

Inputs = Annotated[
    list[str], typer.Argument(metavar="INPUT...", help="Tars, Parquet, folders: paths, URLs, globs, {braces}.")
]
Output = Annotated[str, typer.Option("-o", "--output", help="Output folder of the run.")]


def one_of(*names: str, **options: Any) -> Any:
    """Return an option that takes one of some names: what takes it says in one line if it is none of them."""
    return typer.Option(metavar="|".join(names), autocompletion=lambda: list(names), **options)


Device = Annotated[str, one_of("auto", "cpu", "gpu", help="What the workers compute on.")]
Keep = Annotated[str, one_of("hard", "easy", "random", help="Who stays of those that --keep-by does not tell apart.")]
EpsList = Annotated[
    list[float] | None,
    typer.Option("--eps-list", min=0, max=1, help="Count what would stay by this eps too; repeatable."),
]
OnlyReference = Annotated[
    bool, typer.Option("--only-reference", help="Compare with the reference alone, as for an evaluation set.")
]
MinCaption = Annotated[
    float | None, typer.Option("--min-caption-similarity", min=-1, max=1, help="Keep caption_similarity >= F.")
]
Caption = Annotated[
    str | None,
    typer.Option(metavar="EXT[:KEY]", help="Compare images with these captions: txt, or json:KEY. [default: txt]"),
]
ZeroShot = Annotated[
    list[str] | None,
    typer.Option(metavar="LABEL=PROMPT", help="Tell what images show by prompts, two labels at least; repeatable."),
]
ZeroShotRange = Annotated[
    list[str] | None,
    typer.Option(metavar="LABEL=MIN:MAX", help="Keep this range of a label's probability; repeatable."),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        metavar="COLUMN=MIN:MAX", help="Keep this range of a column of sidecars or scores, as punsafe=:0.1; repeatable."
    ),
]
IsIn = Annotated[
    list[str] | None,
    typer.Option(
        "--is-in", metavar="COLUMN=VALUE|@FILE",
        help="Keep these values of a column, as license=cc0, or those that a file lists; repeatable.",
    ),
]  # fmt: skip
IsNotIn = Annotated[
    list[str] | None,
    typer.Option(
        "--is-not-in", metavar="COLUMN=VALUE|@FILE",
        help="Leave these values out, as url=@opted-out.txt; repeatable.",
    ),
]  # fmt: skip
Workers = Annotated[int | None, typer.Option(min=1, help="Local worker processes.")]
Scheduler = Annotated[str | None, typer.Option(help="Address or file of a running Dask scheduler.")]
TlsCa = Annotated[str | None, typer.Option("--tls-ca-file", help="PEM file of the CA of a tls:// scheduler.")]
TlsCert = Annotated[str | None, typer.Option("--tls-cert", help="PEM file of the client's certificate.")]
TlsKey = Annotated[str | None, typer.Option("--tls-key", help="PEM file of the client's private key.")]
Tls = tuple[str | None, str | None, str | None]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace another run in the output folder.")]
StorageOption = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-option", metavar="KEY=VALUE",
        help="Option of the inputs' store, such as anon=true or client_kwargs.endpoint_url=URL; repeatable.",
    ),
]  # fmt: skip
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the accounting alone.")]
LogJson = Annotated[
    str | None, typer.Option("--log-json", metavar="FILE", help="Append a line of JSON for each partition that ends.")
]
Performance = Annotated[
    str | None, typer.Option("--performance-report", metavar="FILE.html", help="Write Dask's own report of the tasks.")
]
Report = Annotated[
    bool | None, typer.Option("--report/--no-report", help="Make OUT/report.html at the end; the default.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder: it has to be there.")]
MaxFailed = Annotated[
    int | None, typer.Option(min=0, help="Partitions that may fail; their samples are 'failed' rows. Default: 0.")
]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Try partitions again that failed in a done run.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and how long it takes; do nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object.")]


def refuse_options(ctx: typer.Context, names: Sequence[str], why: str) -> None:
    """Refuse options of a command that would do nothing.

    Raises
    ------
    ConfigError
        If one of these parameters was given.
    """
    for name in names:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigError(f"--{name.replace('_', '-')} {why}")


class StoppedError(ImgcurateError):
    """Ctrl-C or SIGTERM during a run; typer would end the process without a word.

    Attributes
    ----------
    exit_code : int
        128 and the number of the signal, as shells have it.
    """

    exit_code = 128 + signal.SIGINT


@contextmanager
def running(quiet: bool, log: str | None = None) -> Iterator[Any]:
    """Yield a callback that shows progress; Ctrl-C and SIGTERM end what runs in this context, and say how to go on.

    The second one says that it is ending, the third one ends the process at once.

    Raises
    ------
    StoppedError
        If one of them comes.
    """
    stop = _Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with show_progress(quiet, log) as progress:
            yield progress
    except KeyboardInterrupt as exc:
        stopped = StoppedError()
        stopped.exit_code = 128 + (stop.first or signal.SIGINT)
        raise stopped from exc
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stop:
    """What Ctrl-C and SIGTERM do: the first ends the run in order, the third the process at once."""

    first = 0
    _times = 0

    def __call__(self, number: int, frame: Any) -> None:
        del frame
        self._times += 1
        if self._times == 1:
            self.first = number
            raise KeyboardInterrupt
        if self._times == 2:
            os.write(2, b"imgcurate: stopping; once more ends it at once\n")
        else:
            # As kill -9 would: what was finished is kept.
            os._exit(128 + number)


def run_command(
    execute: Callable[..., Any],
    *,
    device: str,
    scheduler: str | None,
    tls: Tls,
    quiet: bool,
    log: str | None = None,
    **options: Any,
) -> Any:
    """Execute something as Pipeline.run does, with progress; say how it ended, and return its result."""
    from imgcurate.backend import get_backend, why_no_gpu

    options["security"] = security(scheduler, tls)
    if scheduler is None:
        backend = get_backend(device)
        if device == "auto" and not backend.is_gpu and not quiet:
            typer.echo(f"running on the CPU: {why_no_gpu()}", err=True)
    if not quiet:
        # Says what of a run is there; of a cluster, on a terminal, where its dashboard is.
        logging.getLogger("imgcurate.runner").setLevel(logging.INFO)
        if sys.stderr.isatty():
            logging.getLogger("imgcurate.cluster").setLevel(logging.INFO)
    with running(quiet, log) as progress:
        result = execute(scheduler=scheduler, device=device, progress=progress, **options)
    if not quiet and not result.shards:
        why = "nothing was kept" if not result.kept else "the pipeline has no ImageWriterStage"
        if not result.samples:
            why = "the inputs hold no samples (imgcurate inspect says what is in them)"
        typer.echo(f"no shards were written: {why}", err=True)
    if not quiet:
        _tell(result)
    return result


def _tell(result: Any) -> None:
    """Show on a terminal how many samples left and why; name the report."""
    if sys.stderr.isatty():
        table = Table("", "samples", "%")
        for status, count in sorted(result.counts.items(), key=lambda item: (item[0] == schema.STATUS_OK, -item[1])):
            share = f"{100 * count / result.samples:.1f}"
            table.add_row("kept" if status == schema.STATUS_OK else escape(printable(status)), f"{count:,}", share)
        Console(stderr=True).print(table)
    if result.shards:
        typer.echo(f"shards: {result.shards[0].rpartition('/')[0]}", err=True)
    if result.report is not None:
        typer.echo(f"report: {result.report}", err=True)


def show_estimate(pipeline: Any, output: str, *, device: str, n_workers: int | None, as_json: bool) -> None:
    """Print what a run would do."""
    from imgcurate.estimate import estimate_run

    estimate = estimate_run(pipeline, output, device=device, n_workers=n_workers)
    if as_json:
        typer.echo(json.dumps(estimate.as_dict(), indent=1))
        return
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for what, text in estimate.lines():
        table.add_row(escape(printable(what)), escape(printable(text)))
    show_table(table)
    typer.echo("nothing was done (--dry-run)")


def show_table(table: Table) -> None:
    """Print a table: as wide as a terminal; what is read by others, or kept in a file, is not folded."""
    Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _FILE_COLUMNS).print(table)


def show_result(result: Any, as_json: bool) -> None:
    """Print how a run ended: its accounting as the last line, or all as JSON."""
    typer.echo(json.dumps(result.as_dict(), indent=1) if as_json else result.accounting())


def security(scheduler: str | None, tls: Tls) -> Any:
    """Return what the TLS options say; None if they say nothing."""
    from imgcurate.cluster import tls_security

    if scheduler is None and any(tls):
        raise ConfigError("--tls-ca-file, --tls-cert and --tls-key go with --scheduler")
    return tls_security(*tls)
