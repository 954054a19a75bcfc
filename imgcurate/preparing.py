"""The commands that come before a run: ``init schema doctor``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.markup import escape
from rich.table import Table

from imgcurate.console import Json, app, show_table
from imgcurate.errors import ConfigError, printable

__all__ = ["doctor", "init", "schema"]

_COLOURS: Final = {"ok": "green", "note": "blue", "warning": "yellow", "problem": "red"}


@app.command(
    short_help="Write a commented YAML file of a pipeline to begin with.",
    epilog="Example: imgcurate init pipeline.yaml --input 'shards/*.tar'",
)
def init(
    file: Annotated[Path, typer.Argument(metavar="PIPELINE.yaml", help="The file to write.")] = Path("pipeline.yaml"),
    input_: Annotated[
        list[str] | None, typer.Option("--input", "-i", help="What is to be read; repeatable. [default: shards/*.tar]")
    ] = None,
    encoder: Annotated[str, typer.Option(help="open_clip model; tiny-image (needs no weights); or none.")] = "ViT-L-14",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Write a pipeline's YAML file to begin with: all stages and parameters, with what they do."""
    from imgcurate.models.encoders import EncoderSpec
    from imgcurate.templates import SCHEMA_FILE, commented_yaml, json_schema

    if encoder != "none":
        EncoderSpec(encoder)
    schema_file = file.with_name(SCHEMA_FILE)
    if file.exists() and not overwrite:
        raise ConfigError(f"{file} is there already: name another file, or overwrite it (--overwrite)")
    try:
        schema_file.write_text(json.dumps(json_schema(), indent=1) + "\n")
        file.write_text(commented_yaml(input_ or ("shards/*.tar",), encoder))
    except OSError as exc:
        raise ConfigError(f"cannot write {file}: {exc.strerror or exc}") from exc
    typer.echo(f"{file} is written, and {schema_file} for editors; next: imgcurate run {file} -o OUT --dry-run")


@app.command(epilog="Example: imgcurate schema > pipeline.schema.json")
def schema() -> None:
    """Print the JSON schema of a pipeline's YAML file."""
    from imgcurate.templates import json_schema

    typer.echo(json.dumps(json_schema(), indent=1))


@app.command(
    short_help="Say what this machine can do, and how to mend it.", epilog="Example: imgcurate doctor -o /data/OUT"
)
def doctor(
    output: Annotated[str, typer.Option("-o", "--output", help="Where output would go.")] = ".",
    model_dir: Annotated[str | None, typer.Option(help="Folder with weights.")] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine and environment can do, and how to mend what is wrong. Exit code 1 if runs would fail."""
    from imgcurate.doctor import examine

    findings = examine(output, model_dir)
    problems = [f for f in findings if f.state == "problem"]
    if as_json:
        typer.echo(json.dumps({"ok": not problems, "findings": [f.as_dict() for f in findings]}, indent=1))
    else:
        table = Table("", "what")
        for column in ("found", "what mends it"):
            table.add_column(column, overflow="fold")
        for f in findings:
            colour = _COLOURS[f.state]
            cells = (escape(printable(text)) for text in (f.what, f.found, f.cure))
            table.add_row(f"[{colour}]{f.state}[/{colour}]", *cells)
        show_table(table)
        typer.echo("runs would fail: see the problems above" if problems else "ready")
    if problems:
        raise typer.Exit(1)
