"""Prove that a finished run is whole, and what its inputs give: files, catalog, sources, outputs, references.

1. *files*: each file that ``_SUCCESS`` lists is there with its size and SHA-256, and no other one.
2. *catalog*: each uid is there once, in order, of the right input; counts are those of the manifest.
3. *sources*: the inputs, indexed again, give exactly the rows of the catalog.
4. *outputs*: the tars, made again from catalog and inputs, have the SHA-256 of those that are there.
5. *references*: each duplicate names a row that is kept.

No image is decoded: what a model or a filter decided is taken as it is.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple

import pyarrow as pa
from distributed import Client
from distributed.security import Security

from imgcurate import schema
from imgcurate.backend import cpu_count
from imgcurate.catalog import Catalog, Manifest, fingerprint, part_name
from imgcurate.cluster import open_client
from imgcurate.errors import CatalogError, ConfigError, ImgcurateError, printable
from imgcurate.execution import Progress, call_frame, run_waves
from imgcurate.export import OutputShard, plan_shards, shard_name
from imgcurate.inputs import describe_shards, find_shards
from imgcurate.members import MemberColumns
from imgcurate.shards import Shard
from imgcurate.sidecars import Sidecars
from imgcurate.storage import StorageOptions, exists, is_local, join_url, list_files, local_path
from imgcurate.success import SUCCESS, FileDigest, Success
from imgcurate.verification.checks import Output, Part, Reading, check_file, check_part, check_shard
from imgcurate.verification.embeddings import is_of_embeddings, verify_embeddings
from imgcurate.verification.references import Record, check_references, partitions_of

__all__ = ["Problem", "Verification", "verify_run"]

_MOST_PROBLEMS: Final = 10_000
_FOLDERS: Final = ("catalog", "shards", "dedup")
_WITHOUT_ROW: Final = (
    schema.STATUS_TAR_ERROR, schema.STATUS_NO_IMAGE, schema.STATUS_READ_ERROR, schema.STATUS_DECODE_ERROR,
    schema.STATUS_DECODER_CRASH, schema.STATUS_TOO_SMALL, schema.STATUS_FAILED,
)  # fmt: skip
_DEDUP_STAGES: Final = frozenset({"ExactDedupStage", "PerceptualDedupStage", "SemanticDedupStage"})


class Problem(NamedTuple):
    """Something that is not as it should be.

    Attributes
    ----------
    kind : str
        ``unfinished``, ``mark``, ``missing``, ``damaged``, ``unlisted``, ``catalog``, ``input`` (gone or changed),
        ``source`` (rows and samples differ), ``output`` or ``reference``.
    place : str
        The file, part or input.
    message : str
        What is wrong, in words.
    """

    kind: str
    place: str
    message: str

    def line(self) -> str:
        """Return it as one line, safe to print."""
        return printable(" ".join(f"{self.kind}: {self.place}: {self.message}".split()))


@dataclass
class Verification:
    """What :func:`verify_run` found.

    Attributes
    ----------
    folder : str
        The output folder of the run.
    quick : bool
        Whether the inputs were left alone.
    problems : list of Problem
        What is wrong; the first 10,000, and of one part or shard the first 20.
    n_problems : int
        How many there are in all.
    notes : list of str
        What could not be checked, and is no fault.
    checked : dict of str to int
        How many of what were checked: ``files``, ``nbytes`` of these, ``samples``, ``kept``, ``inputs``,
        ``shards`` that were made anew, ``duplicates``.
    """

    folder: str
    quick: bool = False
    problems: list[Problem] = field(default_factory=list)
    n_problems: int = 0
    notes: list[str] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.n_problems

    def add(self, kind: str, place: str, message: str) -> None:
        """Note a problem."""
        self.take([(kind, place, message)], 1)

    def take(self, faults: Sequence[Sequence[str]], n: int) -> None:
        """Note the problems of a task, which found `n` in all."""
        self.n_problems += n
        room = _MOST_PROBLEMS - len(self.problems)
        self.problems += [Problem(*f) for f in faults[:room]]

    def summary(self) -> str:
        """Return the line that says what was proved, or how much is wrong."""
        if not self.ok:
            return f"{self.n_problems:,} problem{'s' if self.n_problems > 1 else ''} in {self.folder}"
        n = self.checked
        counted = [(n[name], name) for name in ("samples", "shards") if name in n]
        what = [f"{count:,} {name.removesuffix('s') if count == 1 else name}" for count, name in counted]
        what += [_size(n.get("nbytes", 0))]
        how = "recorded" if self.quick or "shards" not in n else "in their sources"
        return f"{', '.join(what)}: all as {how}"

    def lines(self, most: int) -> list[str]:
        """Return at most so many problems, the notes, and the summary, each in a line."""
        shown = [p.line() for p in self.problems[:most]]
        if more := self.n_problems - len(shown):
            shown.append(f"... and {more:,} more problems (--json shows {len(self.problems):,})")
        return [*shown, *(f"note: {printable(n)}" for n in self.notes), self.summary()]

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        problems = [p._asdict() for p in self.problems]
        return {"ok": self.ok, "folder": self.folder, "quick": self.quick, "checked": self.checked,
                "n_problems": self.n_problems, "problems": problems, "notes": self.notes}  # fmt: skip


def _size(nbytes: int) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:,} {unit}" if unit == "bytes" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000  # type: ignore[assignment]
    return f"{nbytes:,.1f} TB"


def verify_run(
    folder: str,
    *,
    storage_options: StorageOptions | None = None,
    quick: bool = False,
    client: Client | None = None,
    scheduler: str | None = None,
    security: Security | None = None,
    n_workers: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Prove that the output folder of a run is whole, and what its inputs give.

    Parameters
    ----------
    folder : str
        The output folder: path or fsspec URL. That of :func:`dedup_embeddings` will do too.
    storage_options : mapping, optional
        fsspec options of the inputs.
    quick : bool
        Leave the inputs alone: files, catalog and references alone are checked.
    client : distributed.Client, optional
        Where the checks run; by default in threads of this process.
    scheduler : str, optional
        Address of a running scheduler to run them on.
    security : distributed.security.Security, optional
        TLS settings for `scheduler`, see :func:`imgcurate.cluster.tls_security`.
    n_workers : int, optional
        Local processes to run them in, if more than one.
    progress : callable, optional
        Called as in :meth:`Pipeline.run`.

    Returns
    -------
    Verification
        What is wrong, if anything; also damaged files are told there.

    Raises
    ------
    ConfigError
        If the folder holds no run.

    Notes
    -----
    Reads all files of the output once and, unless `quick`, the headers of all members of the inputs and the bytes
    of the kept samples. Memory is that of a part without embeddings and of an output shard's rows per task.
    """
    folder = folder if not is_local(folder) else local_path(folder)
    with contextlib.ExitStack() as stack:
        if client is None and (scheduler is not None or (n_workers or 1) > 1):
            local = open_client(device="cpu", n_workers=n_workers, scheduler=scheduler, security=security)
            client = stack.enter_context(local)
        return _Checks(folder, storage_options, quick, client, progress).run()


@dataclass
class _Checks:
    folder: str
    options: StorageOptions | None
    quick: bool
    client: Client | None
    progress: Progress | None
    manifest: Manifest = field(init=False)
    done: Verification = field(init=False)

    def run(self) -> Verification:
        self.done = Verification(self.folder, self.quick)
        mark = self._begin()
        if not self.done.ok and mark is None and self.manifest.state != "done":
            return self.done
        digests = self._files(mark)
        if is_of_embeddings(self.manifest):
            verify_embeddings(self.folder, self.manifest, self.done, options=self.options, quick=self.quick)
            return self.done
        parts = self._catalog(mark)
        if parts is not None:
            self._outputs(parts, digests)
            self._references(parts)
        return self.done

    def _begin(self) -> Success | None:
        """Read manifest and mark, and compare them."""
        try:
            manifest = Manifest.load(self.folder)
        except CatalogError as exc:
            raise ConfigError(f"{exc}: without it nothing can be verified") from exc
        if manifest is None:
            raise ConfigError(f"{self.folder} holds no run of imgcurate: expected its output folder")
        self.manifest = manifest
        if fingerprint(manifest.config) != manifest.fingerprint:
            self.done.add("record", "manifest.json", "its config is not the one that its fingerprint is of")
        mark, place = None, join_url(self.folder, SUCCESS)
        if manifest.state != "done":
            self.done.add("unfinished", self.folder, "the run is not finished: give its command again, and it goes on")
        try:
            mark = Success.load(self.folder)
        except CatalogError as exc:
            self.done.add("mark", SUCCESS, str(exc))
            return None
        if mark is None:
            self.done.add("unfinished", place, "is not there: run the same command again")
            return None
        ours = (manifest.fingerprint, manifest.samples, manifest.counts)
        for name, a, b in zip(
            ("fingerprint", "samples", "counts"), (mark.fingerprint, mark.samples, mark.counts), ours, strict=True
        ):
            if a != b:
                self.done.add("mark", SUCCESS, f"has {name} {a}, and manifest.json {b}")
        return mark

    def _files(self, mark: Success | None) -> dict[str, FileDigest | None]:
        """Check all files; return what each should be: what the mark says, or else what it is."""
        there = [f"{f}/{n}" for f in _FOLDERS for n in list_files(join_url(self.folder, f), "")]
        listed: dict[str, FileDigest | None] = dict(mark.files) if mark is not None else dict.fromkeys(there)
        for name in sorted({*there} - {*listed}):
            self.done.add("unlisted", name, f"is not a file of the run: {SUCCESS} does not list it")
        if exists(join_url(self.folder, "checkpoint")):
            self.done.notes.append("checkpoint/ of the run is still there: running the same command again removes it")
        items = sorted(listed.items())
        results = self._map("files", check_file, items, folder=self.folder)
        self.done.checked |= {"files": len(items), "nbytes": sum(r.get("nbytes", 0) for r in results)}
        self._bad_files = {n for (n, _), r in zip(items, results, strict=True) if r.get("failed")}
        if mark is None:
            found = zip(items, results, strict=True)
            return {n: FileDigest(r["nbytes"], r["sha256"]) for (n, _), r in found if not r.get("failed")}
        for shard in self.manifest.shards:
            name = f"shards/{shard['name']}"
            digest = mark.files.get(name)
            told = {k: shard[k] for k in ("nbytes", "sha256") if k in shard}
            if digest is None or told != {k: getattr(digest, k) for k in told}:
                self.done.add("mark", name, f"is not listed in {SUCCESS} as in manifest.json")
        return listed

    def _catalog(self, mark: Success | None) -> list[dict[str, Any]] | None:
        """Check the parts, and unless it is to be quick the inputs; None if some part cannot be read."""
        inputs, increments = self.manifest.config["inputs"], self.manifest.increments
        if increments and increments[-1] != len(inputs):
            self.done.add(
                "catalog", "manifest.json", f"has {len(inputs)} inputs, and says that there were {increments}"
            )
            return None
        self.partitions = partitions_of(self.manifest)
        groups = list(self.partitions)
        if len(groups) != self.manifest.n_parts:
            self.done.add(
                "catalog", "manifest.json", f"has {self.manifest.n_parts} parts, for {len(inputs)} inputs {len(groups)}"
            )
            return None
        if mark is not None:
            for name in (f"catalog/{part_name(i)}" for i in range(len(groups))):
                if name not in mark.files:
                    self.done.add("mark", name, f"is not listed in {SUCCESS}")
        self.catalog = Catalog(self.folder, len(groups))
        self.reading = None if self.quick else self._reading()
        shards = [None] * len(inputs) if self.quick else _recorded_shards(self.manifest, self.options)
        items = [
            Part(i, g.start, tuple(inputs[g.start : g.stop]), tuple(shards[g.start : g.stop]))
            for i, g in enumerate(groups)
        ]
        phase = "catalog" if self.quick else "catalog and inputs"
        results = self._map(phase, check_part, items, catalog=self.catalog, reading=self.reading)
        self.done.checked |= {"inputs": 0 if self.quick else len(inputs)}
        if any(r.get("failed") for r in results):
            self.done.notes.append("outputs and duplicates are not checked, because the catalog is damaged")
            return None
        self._check_counts(results)
        return results

    def _check_counts(self, results: list[dict[str, Any]]) -> None:
        counts: dict[str, int] = {}
        for number, result in enumerate(results):
            if result["columns"] != results[0]["columns"]:
                self.done.add("catalog", f"catalog part {number}", "has other columns than the first one")
            for status, n in result["counts"].items():
                counts[status] = counts.get(status, 0) + n
        samples = sum(counts.values())
        self.done.checked |= {"samples": samples, "kept": counts.get(schema.STATUS_OK, 0)}
        if counts != self.manifest.counts or samples != self.manifest.samples:
            there = f"{self.manifest.samples:,} samples, {self.manifest.counts}"
            self.done.add(
                "catalog", "catalog", f"has {samples:,} samples, {dict(sorted(counts.items()))}; manifest.json {there}"
            )

    def _reading(self) -> Reading:
        stages = self.manifest.config["stages"]
        reader: dict[str, Any] = next((s for s in stages if s["stage"] == "ImageReaderStage"), {})
        members = MemberColumns.of(reader.get("text_columns", ()), reader.get("json_columns"))
        columns = [(source, name, pa.type_for_alias(t)) for source, name, t in self.manifest.config["sidecars"]]
        return Reading(self.options, members, Sidecars(tuple(columns), strict=False))

    def _outputs(self, parts: list[dict[str, Any]], digests: dict[str, FileDigest | None]) -> None:
        writer = next((s for s in self.manifest.config["stages"] if s["stage"] == "ImageWriterStage"), None)
        planned = plan_shards([p["kept"] for p in parts], writer["images_per_tar"]) if writer else []
        self._check_plan(planned)
        items = []
        for shard in planned:
            names = [f"shards/{shard_name(shard.number)}.{ending}" for ending in ("tar", "parquet")]
            for name in names:
                if name not in digests and name not in self._bad_files:
                    self.done.add("missing", name, "belongs to the run by its catalog, and is not there")
            readable = names[1] in digests and names[1] not in self._bad_files
            items.append(Output(shard, digests.get(names[0]), readable))
        gone = [number for part in parts for number in part["gone"]]
        phase = "sidecars" if self.quick else "outputs"
        results = self._map(phase, check_shard, items, catalog=self.catalog, reading=self.reading, gone=gone)
        self.done.checked["shards"] = len(items) if self.quick else sum(r.get("compared", 0) for r in results)
        if skipped := sum(r.get("skipped", 0) for r in results):
            self.done.notes.append(f"{skipped:,} of {len(items):,} shards are not compared with sources that are gone")

    def _check_plan(self, planned: list[OutputShard]) -> None:
        ours = [(f"{shard_name(s.number)}.tar", s.samples) for s in planned]
        told = [(s["name"], s["samples"]) for s in self.manifest.shards]
        for one, other in zip(ours, told, strict=False):
            if one != other:
                self.done.add("output", "manifest.json", f"has {other[1]} samples in {other[0]}, the catalog {one[1]}")
        if len(ours) != len(told):
            self.done.add("output", "manifest.json", f"has {len(told)} shards, by the catalog there are {len(ours)}")

    def _references(self, parts: list[dict[str, Any]]) -> None:
        todo = [i for i, p in enumerate(parts) if p["duplicates"]]
        token = uuid.uuid4().hex
        record = Record(self.catalog, self.partitions, _never_named(self.manifest), token)
        others = [_open_record(f, token) for f in _reference_folders(self.manifest)] if todo else []
        there = [o for o in others if isinstance(o, Record)]
        results = self._map("references", check_references, todo, record=record, others=there)
        self.done.checked["duplicates"] = sum(r.get("checked", 0) for r in results)
        if sum(r.get("unknown", 0) for r in results):
            self.done.notes += [o for o in others if isinstance(o, str)]

    def _map(
        self, phase: str, check: Callable[..., dict[str, Any]], items: Sequence[Any], **kwargs: Any
    ) -> list[dict[str, Any]]:
        """Run a check for each item, and take its faults."""
        if not items:
            return []
        if self.client is not None:
            by_number = run_waves(
                self.client, lambda ns: call_frame(check, ns, [items[n] for n in ns], **kwargs),
                range(len(items)), phase=phase, progress=self.progress,
            )  # fmt: skip
            results = [by_number[i] for i in range(len(items))]
        else:
            results = []
            with ThreadPoolExecutor(min(cpu_count(), 8)) as pool:
                for result in pool.map(partial(check, **kwargs), items):
                    results.append(result)
                    if self.progress:
                        self.progress(phase, len(results), len(items), {})
        for result in results:
            self.done.take(result.pop("faults"), result.pop("n_faults"))
        return results


def _recorded_shards(manifest: Manifest, options: StorageOptions | None) -> list[Shard | None]:
    """Return the inputs of a manifest to be read again; None for files of a folder that are not there any more.

    A manifest says of the files of a folder only how many they are, and a digest of their states. So they are
    looked for as the run did; if none are in that state, the same ones in the folder's order are taken.
    """
    inputs: list[dict[str, Any]] = manifest.config["inputs"]
    shards = [None if "files" in i else Shard(i["url"]) for i in inputs]
    folders = sorted({i["url"] for i in inputs if "files" in i})
    if not folders:
        return shards
    places = [manifest.source["file_paths"]] if manifest.source.get("file_paths") else []
    for patterns in (*places, folders):
        found: list[Shard] = []
        with contextlib.suppress(ImgcurateError):
            found = [s for s in find_shards(patterns, options) if s.files and s.url in folders]
        exact = {_as_key(d): s for d, s in zip(describe_shards(found, options), found, strict=True)}
        shards = [s or exact.get(_as_key(i)) for s, i in zip(shards, inputs, strict=True)]
        for folder in folders:
            here = [n for n, i in enumerate(inputs) if i["url"] == folder and "files" in i]
            same = [s for s in found if s.url == folder]
            if [inputs[n]["files"] for n in here] == [len(s.files) for s in same]:
                for n, shard in zip(here, same, strict=True):
                    shards[n] = shards[n] or shard
    return shards


def _as_key(described: dict[str, Any]) -> tuple[Any, ...]:
    return described["url"], described.get("files"), described.get("modified")


def _never_named(manifest: Manifest) -> tuple[str, ...] | None:
    """Return the statuses of rows that no duplicate may name; None for all but ``ok``.

    What a dedup stage keeps, a filter after it may still drop; the published rule of SemDeDup lets samples go for
    others that go.
    """
    stages = [s for s in manifest.config["stages"] if s["stage"] != "ImageWriterStage"]
    first = next((i for i, s in enumerate(stages) if s["stage"] in _DEDUP_STAGES), len(stages))
    chains = any(s.get("mode") == "semdedup" for s in stages if s["stage"] in _DEDUP_STAGES)
    filtered = any(s["stage"] not in _DEDUP_STAGES for s in stages[first:])
    if not chains and not filtered and first < len(stages):
        return None
    return _WITHOUT_ROW if chains else (*_WITHOUT_ROW, schema.STATUS_DUPLICATE)


def _reference_folders(manifest: Manifest) -> list[str]:
    found: dict[str, None] = {}
    for stage in manifest.config["stages"]:
        given = stage.get("reference") or ()
        found |= dict.fromkeys([given] if isinstance(given, str) else given)
    return list(found)


def _open_record(folder: str, token: str) -> Record | str:
    """Open a reference run; if it is gone, return the note about it."""
    try:
        manifest = Manifest.load(folder)
        if manifest is not None and manifest.state == "done":
            return Record(Catalog(folder, manifest.n_parts), partitions_of(manifest), None, token)
    except (ImgcurateError, OSError, LookupError) as exc:
        return f"the reference run {folder} cannot be read, so duplicates of its samples are not checked: {exc}"
    return f"the reference run {folder} is gone, so duplicates of its samples are not checked"
