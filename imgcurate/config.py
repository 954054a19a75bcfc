"""A whole run as one YAML file, and the stages by name.

.. code-block:: yaml

    inputs: shards/{00000..00099}.tar
    files_per_partition: 4
    device: auto
    workers: 2
    stages:
      - ImageReaderStage: {dali_batch_size: 64}
      - ImageEmbeddingStage: {model: ViT-L-14, pretrained: openai}
      - ImageAestheticFilterStage: {score_threshold: 0.5}
      - SemanticDedupStage: {eps: 0.05}
      - mypackage.stages.MyStage: {threshold: 3}
      - ImageWriterStage: {images_per_tar: 1000}

``ImageReaderStage`` may be left out where its defaults do.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from imgcurate.errors import ConfigError, nearest
from imgcurate.pipeline import Pipeline
from imgcurate.stages import FilePartitioningStage, ImageReaderStage, Stage
from imgcurate.stages.registry import make_stage

__all__ = ["RunConfig", "load_config"]

_DEEPEST_PLACE: Final = 4


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key which stands twice: YAML would take the last one, silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        seen: set[Any] = set()
        # Keys that cannot be hashed are refused below.
        for key in keys:
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} stands twice", node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


@dataclass(frozen=True)
class _Places:
    """Where the keys of a file stand.

    Attributes
    ----------
    file : str
        The file.
    lines : dict of tuple to int
        By the keys and places that lead to it, the line of a key or of an item of a list, from 1 on.
    overrides : sequence of str
        What takes the place of what the file says: ``key.key=value``.
    """

    file: str = ""
    lines: Mapping[tuple[str | int, ...], int] = field(default_factory=dict)
    overrides: Sequence[str] = ()

    @staticmethod
    def of(file: str, node: yaml.Node | None, overrides: Sequence[str]) -> _Places:
        return _Places(file, dict(_lines(node, ())), tuple(overrides))

    def named(self, *keys: str | int) -> str:
        """Return ``FILE, line N`` of the innermost of these keys that stands in the file."""
        for stop in range(len(keys), 0, -1):
            if keys[:stop] in self.lines:
                return f"{self.file}, line {self.lines[keys[:stop]]}"
        return self.file

    def of_stage(self, number: int, problem: str) -> str:
        """Return the place of the parameter of a stage that a message is about, else of the stage."""
        found: list[tuple[int, str]] = []
        for text in self.overrides:
            names = text.partition("=")[0].split(".")
            top, *stage, key = names if len(names) > 1 else ("", *names)
            is_this = top == "stages" and stage and (stage[0] == str(number) or stage[0] in problem)
            if is_this and (named := re.search(rf"\b{re.escape(key)}\b", problem)):
                found.append((named.start(), text))
        if found:
            # What a message names first is what it is about; what may have been meant comes after it.
            return f"--set {min(found)[1]}"
        inside = [keys for keys in self.lines if keys[:2] == ("stages", number) and len(keys) == _DEEPEST_PLACE]
        about = [keys for keys in inside if re.search(rf"\b{re.escape(str(keys[-1]))}\b", problem)]
        return self.named(*(about[0] if about else ("stages", number)))


def _lines(node: yaml.Node | None, keys: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], int]]:
    if len(keys) == _DEEPEST_PLACE:
        return
    inside: list[tuple[Any, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        inside = [(key.value, key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
    elif isinstance(node, yaml.SequenceNode):
        inside = [(number, item, item) for number, item in enumerate(node.value)]
    for name, begin, value in inside:
        yield (*keys, name), begin.start_mark.line + 1
        yield from _lines(value, (*keys, name))


class RunConfig(BaseModel):
    """A run: what is read, which stages, on what.

    Attributes
    ----------
    inputs : str or list of str
        Paths, fsspec URLs or patterns of tar shards.
    stages : list
        Stage names, each alone or as a mapping to its parameters.
    files_per_partition : int, optional
        Shards per partition; by default one, but tiny ones together.
    sidecar_columns : "auto" or list of str
        Columns to join from the Parquet files beside tars; ``[]`` joins none.
    storage_options : mapping
        Passed to fsspec for the inputs.
    device : {"auto", "cpu", "gpu"}
        What the workers compute on.
    workers : int, optional
        Workers of the local cluster.
    scheduler : str, optional
        Address of a running Dask scheduler.
    max_failed : int
        How many partitions may fail; see :meth:`Pipeline.run`.
    """

    model_config = ConfigDict(extra="forbid")

    inputs: str | list[str]
    stages: list[str | dict[str, dict[str, Any] | None]] = Field(min_length=1)
    files_per_partition: int | None = Field(default=None, ge=1)
    sidecar_columns: Literal["auto"] | list[str] = "auto"
    storage_options: dict[str, Any] = Field(default_factory=dict)
    device: str = "auto"
    workers: int | None = Field(default=None, ge=1, strict=True)
    scheduler: str | None = None
    max_failed: int = Field(default=0, ge=0, strict=True)
    _places: _Places = PrivateAttr(default_factory=_Places)

    @property
    def imports_stages(self) -> bool:
        """Whether a stage is named by its import path: then the file decides what code runs."""
        return any("." in name for entry in self.stages for name in ([entry] if isinstance(entry, str) else entry))

    def pipeline(self) -> Pipeline:
        """Return the pipeline that the configuration describes.

        Raises
        ------
        ConfigError
            If a stage or a parameter is unknown or wrong.
        """
        source = FilePartitioningStage(
            self.inputs, self.files_per_partition, self.storage_options or None, self.sidecar_columns
        )
        stages = []
        for i, entry in enumerate(self.stages):
            try:
                stages.append(_make_stage(i, entry))
            except ConfigError as exc:
                place = self._places.of_stage(i, str(exc))
                raise type(exc)(f"{place}: {exc}" if place else str(exc)) from exc
        if not stages or not isinstance(stages[0], ImageReaderStage):
            stages.insert(0, ImageReaderStage())
        return Pipeline([source, *stages])


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file.

    Parameters
    ----------
    path : str or Path
        The file.
    overrides : sequence of str
        ``key.key=value`` each, in place of what the file says: values are YAML, list items are named by their
        place, and stages by their name too; those of one's own also by that of their class.

    Raises
    ------
    ConfigError
        If it cannot be read, is not YAML, or has a key or value that is wrong; the message names the
        place and the nearest valid name.
    """
    try:
        loader = _UniqueKeyLoader(Path(path).read_text(encoding="utf-8"))
        try:
            node = loader.get_single_node()
            content = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read {path}: {exc}") from exc
    except (yaml.YAMLError, RecursionError) as exc:
        raise ConfigError(_unreadable(path, exc)) from exc
    if not isinstance(content, dict):
        raise ConfigError(f"{path} should be a mapping with 'inputs' and 'stages', not {type(content).__name__}")
    if _contains_itself(content):
        raise ConfigError(f"{path}: something in it contains itself, by an anchor (&) and an alias (*)")
    for text in overrides:
        _override(content, text)
    places = _Places.of(str(path), node, overrides)
    try:
        config = RunConfig(**content)
    except ValidationError as exc:
        raise ConfigError(_said(exc, content, places)) from exc
    config._places = places
    return config


def _contains_itself(content: Any) -> bool:
    """Return whether a mapping or a list is somewhere within itself; each is looked at once."""
    inside: set[int] = set()
    done: set[int] = set()
    # A thing is met twice: when what is in it comes next, and when all of that is done.
    todo = [(content, False)]
    while todo:
        thing, is_done = todo.pop()
        if is_done:
            inside.discard(id(thing))
            done.add(id(thing))
        elif id(thing) in inside:
            return True
        elif id(thing) not in done and isinstance(thing, (dict, list)):
            inside.add(id(thing))
            todo.append((thing, True))
            todo += [(each, False) for each in (thing.values() if isinstance(thing, dict) else thing)]
    return False


def _unreadable(path: str | Path, exc: Exception) -> str:
    """Say in words why a file is not YAML: where, what, and what it likely is."""
    mark = getattr(exc, "problem_mark", None)
    if not isinstance(exc, yaml.MarkedYAMLError) or mark is None:
        return f"{path} is not valid YAML: {' '.join(str(exc).split())}"
    begin = exc.context_mark.line + 1 if exc.context_mark is not None else mark.line + 1
    problem = " ".join(str(exc.problem).split())
    cure = next((words for part, words in _CURES.items() if part in problem), "").format(
        first=begin, last=mark.line + 1
    )
    return f"{path}, line {mark.line + 1}: this is not valid YAML: {problem}{f' ({cure})' if cure else ''}"


_CURES: Final = {
    "'\\t'": "a tab: indent with spaces",
    "mapping values are not allowed": "is the colon missing behind the name of the stage in the line before?",
    "expected <block end>": (
        "what belongs together begins in the same column: look at the indentation, and at spaces behind colons, of "
        "lines {first} to {last}"
    ),
    "could not find expected ':'": "is a space missing behind a colon?",
    "alias": "text that begins with * or & stands in quotes: '*.tar'",
    "anchor": "text that begins with * or & stands in quotes: '*.tar'",
    "expected alphabetic or numeric": "text that begins with * or & stands in quotes: '*.tar'",
}


def _said(exc: ValidationError, content: Mapping[str, Any], places: _Places) -> str:
    """Say in words what pydantic found first; a key that is not known is likely the one that is missing."""
    errors = exc.errors()
    error = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    place = error["loc"]
    if place[0] == "stages" and len(place) > 1:
        return (
            f"{places.named(*place[:2])}: stages[{place[1]}] should be the name of a stage, or a name with its "
            f"parameters indented under it, not {content['stages'][int(place[1])]!r}"
        )
    where = ".".join(str(p) for p in place if not str(p).startswith(("list[", "dict[", "str")))
    if error["type"] == "extra_forbidden":
        return f"{places.named(*place)}: there is no key {where!r}{nearest(where, RunConfig.model_fields)}"
    if error["type"] == "missing":
        example = {"inputs": "shards/*.tar", "stages": "a list of stages"}.get(where, "...")
        return f"{places.file}: the key {where!r} is missing, as in {where}: {example}"
    if where == "stages" and isinstance(error["input"], dict):
        return f"{places.named(*place)}: stages should be a list: put '- ' before the name of each stage"
    words = error["msg"].partition(", unable")[0]
    if not words.startswith("Input should be "):
        return f"{places.named(*place)}: {where}: {words}"
    return f"{places.named(*place)}: {where} should be {words.removeprefix('Input should be ')}, not {error['input']!r}"


def _override(content: dict[str, Any], text: str) -> None:
    """Put a value into a file's content: ``stages.2.score_threshold=0.6``, ``workers=4``."""
    path, equals, shown = text.partition("=")
    *parents, last = path.split(".")
    if not equals or not all([*parents, last]):
        raise ConfigError(f"--set {text} should be KEY=VALUE, such as stages.ImageReaderStage.min_size=256")
    try:
        value = yaml.safe_load(shown)
    except (yaml.YAMLError, RecursionError) as exc:
        raise ConfigError(f"--set {text}: the value is not valid YAML: {' '.join(str(exc).split())}") from exc
    place: Any = content
    done = 0
    while done < len(parents):
        # The name of a stage of one's own has dots in it.
        words = next((n for n in range(len(parents) - done, 1, -1) if _is_named(place, parents[done : done + n])), 1)
        place = _step(place, ".".join(parents[done : done + words]), text, ".".join(parents[:done]))
        done += words
    if isinstance(place, dict):
        place[last] = value
    elif isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = value
    else:
        raise ConfigError(f"--set {text}: {'.'.join(parents)} has nothing to set {last!r} in")


def _names(place: list[Any]) -> list[str]:
    """Return the names of the entries of a list of stages."""
    return [entry if isinstance(entry, str) else next(iter(entry), "") for entry in place]


def _is_named(place: Any, words: Sequence[str]) -> bool:
    return isinstance(place, list) and ".".join(words) in _names(place)


def _step(place: Any, key: str, text: str, where: str) -> Any:
    """Return what a key names in a mapping or a list; of a list of stages also by a stage's name."""
    if isinstance(place, dict):
        if place.get(key) is None:
            place[key] = {}
        return place[key]
    if not isinstance(place, list):
        raise ConfigError(f"--set {text}: {where or 'the file'} is {place!r}, which holds nothing named {key!r}")
    names = _names(place)
    if key not in names and [name.rpartition(".")[2] for name in names].count(key) == 1:
        # The class of a stage of one's own, without its module.
        key = next(name for name in names if name.rpartition(".")[2] == key)
    if key.isdigit() and int(key) < len(place):
        number = int(key)
    elif names.count(key) == 1:
        number = names.index(key)
    else:
        if names.count(key) > 1:
            raise ConfigError(f"--set {text}: {where} has {names.count(key)} entries {key!r}: name one by its number")
        what = "stage" if where == "stages" else f"entry of {where}"
        numbers = f" (they are numbered 0 to {len(names) - 1})" if key.isdigit() else nearest(key, names)
        raise ConfigError(f"--set {text}: there is no {what} {key!r}{numbers}")
    name = names[number]
    if isinstance(place[number], str) or place[number].get(name) is None:
        place[number] = {name: {}}
    return place[number][name]


def _make_stage(number: int, entry: str | Mapping[str, Mapping[str, Any] | None]) -> Stage:
    if isinstance(entry, str):
        name, params = entry, {}
    elif len(entry) == 1:
        name, params_ = next(iter(entry.items()))
        params = dict(params_ or {})
    else:
        raise ConfigError(f"stages[{number}] should be one stage name with its parameters, not {len(entry)} keys")
    if name == FilePartitioningStage.__name__:
        raise ConfigError(
            f"stages[{number}]: what is read is said by 'inputs' and 'files_per_partition', not by a stage"
        )
    return make_stage(f"stages[{number}]", name, params)
