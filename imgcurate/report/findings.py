"""What a report tells, as plain data: the funnel, the scores, the duplicates, the errors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgcurate import schema
from imgcurate.catalog import Manifest
from imgcurate.report.sample import CatalogSample, spread
from imgcurate.stages.registry import recorded_phases, recorded_rules
from imgcurate.stages.rules import AnyRule, Rule

__all__ = [
    "GROUPS",
    "ErrorKind",
    "Examples",
    "Group",
    "Score",
    "Step",
    "curve",
    "errors",
    "funnel",
    "groups",
    "leavers",
    "most_alike",
    "scores",
]

GROUPS: Final = 10
"""How many groups of duplicates a report shows, if nothing else is asked for."""
_BINS: Final = 48
_EXAMPLES: Final = 6
_MAX_SCORES: Final = 16
_MEMBERS: Final = 8
_MAX_ERRORS: Final = 40
_TAIL: Final = 0.995
_SKEWED: Final = 20.0
_CURVE_POINTS: Final = 24
_BEFORE_STAGES: Final[Mapping[str, str]] = {
    schema.STATUS_TAR_ERROR: "damaged in the shard",
    schema.STATUS_READ_ERROR: "could not be read",
    schema.STATUS_NO_IMAGE: "without an image",
    schema.STATUS_DECODE_ERROR: "cannot be decoded",
    schema.STATUS_DECODER_CRASH: "crashed the decoder",
    schema.STATUS_TOO_SMALL: "too small",
    schema.STATUS_FAILED: "partition failed",
}
_BY: Final[Mapping[str, str]] = {
    "content": "the same bytes", "pixels": "the same pixels", "phash": "a near pHash", "embedding": "semantic",
}  # fmt: skip
_KINDS: Final[Mapping[str, str]] = {
    "ExactDedupStage": "exact", "PerceptualDedupStage": "perceptual", "SemanticDedupStage": "semantic",
}  # fmt: skip
_NO_SCORE: Final = frozenset(
    {schema.UID, schema.OFFSET, schema.PHASE, schema.CLUSTER, schema.DUPLICATE_OF, schema.SIMILARITY, schema.CHANNELS,
     schema.AESTHETIC_SCORE_RAW}
)  # fmt: skip
_NUMBER: Final = re.compile(r"\d[\d,.]*")


@dataclass(frozen=True)
class Step:
    """One step of the funnel: how many samples left by it, and how many were left then."""

    label: str
    dropped: int
    left: int


@dataclass(frozen=True)
class Examples:
    """Some rows of a sample, with a word on what they are examples of, and on each."""

    label: str
    rows: list[int]
    notes: list[str]


@dataclass(frozen=True)
class Score:
    """How a column is distributed over the samples that have a value.

    Attributes
    ----------
    column, description : str
        Its name, and what it holds.
    rules : list of Rule
        The thresholds on it.
    edges, kept, left, elsewhere : list of number
        Bins, and how many samples of each stayed, left by a threshold on this column, and left by something else.
    is_log : bool
        Whether the bins are equal in the logarithm.
    missing : int
        Samples without a value.
    examples : list of Examples
        Along the axis.
    """

    column: str
    description: str
    rules: list[Rule]
    edges: list[float]
    kept: list[int]
    left: list[int]
    elsewhere: list[int]
    is_log: bool
    missing: int
    examples: list[Examples] = field(default_factory=list)


@dataclass(frozen=True)
class Group:
    """A sample that stayed, the first of those that left as its duplicates, and how many these are in all."""

    keeper: int | None
    keeper_name: str
    members: Examples
    size: int

    @property
    def rows(self) -> list[int]:
        """All rows that the group shows."""
        return [*([self.keeper] if self.keeper is not None else []), *self.members.rows]


@dataclass(frozen=True)
class ErrorKind:
    """Errors whose reasons differ in numbers alone."""

    status: str
    reason: str
    count: int
    keys: list[str]


def funnel(manifest: Manifest, sample: CatalogSample) -> list[Step]:
    """Return how the samples became fewer, in the order in which a run decides."""
    counts = dict(manifest.counts)
    counts.pop(schema.STATUS_OK, None)
    steps: list[tuple[str, int]] = [(words, counts.pop(s)) for s, words in _BEFORE_STAGES.items() if s in counts]
    for entry in manifest.config.get("stages", []):
        rules: dict[str, list[AnyRule]] = {}
        for rule in recorded_rules(entry):
            rules.setdefault(rule.status, []).append(rule)
        for status, those in rules.items():
            if status in counts:
                limits = ", ".join(rule.words for rule in those)
                steps.append((f"{status}: not {limits}", counts.pop(status)))
        name = entry["stage"].rpartition(".")[2]
        if name in counts:
            steps.append((name, counts.pop(name)))
    duplicates = counts.pop(schema.STATUS_DUPLICATE, 0)
    steps += [(status, n) for status, n in sorted(counts.items())]
    if duplicates:
        steps += _duplicates(duplicates, sample, recorded_phases(manifest.config))
    left = manifest.samples
    out = []
    for label, dropped in steps:
        left -= dropped
        out.append(Step(label, dropped, left))
    return out


def _duplicates(count: int, sample: CatalogSample, phases: Sequence[str]) -> list[tuple[str, int]]:
    """Return the duplicates by the stage that found them, if all rows are there to tell."""
    if not sample.is_whole or schema.PHASE not in sample.table.column_names:
        return [("duplicates", count)]
    # What one finds may be told to be like what a later one keeps: only the phase says who it was.
    found = Counter(sample.table[schema.PHASE].filter(pa.array(_duplicate_mask(sample))).to_pylist())
    steps = []
    for phase, name in enumerate(phases):
        if n := found.pop(phase, 0):
            steps.append((f"duplicates, {_KINDS.get(name, name)}" if name else "duplicates", n))
    return steps + ([("duplicates", rest)] if (rest := sum(found.values())) else [])


def _duplicate_mask(sample: CatalogSample) -> npt.NDArray[np.bool_]:
    return sample.has_status(schema.STATUS_DUPLICATE)


def scores(manifest: Manifest, sample: CatalogSample) -> list[Score]:
    """Return the distributions of the numeric columns; those with thresholds come first."""
    rules: dict[str, list[Rule]] = {}
    for entry in manifest.config.get("stages", []):
        for rule in recorded_rules(entry):
            if isinstance(rule, Rule):
                rules.setdefault(rule.column, []).append(rule)
    decoded = ~sample.has_status(*_BEFORE_STAGES)
    columns = [f.name for f in sample.table.schema if f.name not in _NO_SCORE and _is_number(f.type)]
    columns.sort(key=lambda c: (c not in rules, c not in schema.COLUMNS))
    found = (_score(sample, column, rules.get(column, []), decoded) for column in columns)
    return [score for score in found if score is not None][:_MAX_SCORES]


def _is_number(type_: pa.DataType) -> bool:
    return bool(pa.types.is_floating(type_) or pa.types.is_integer(type_))


def _score(sample: CatalogSample, column: str, rules: list[Rule], decoded: npt.NDArray[np.bool_]) -> Score | None:
    values = sample.numbers(column)
    there = np.flatnonzero(np.isfinite(values) & decoded)
    if not len(there) or (not rules and values[there].min() == values[there].max()):
        return None
    x = values[there]
    span = float(x.max() - x.min())
    # A threshold far beyond all values would leave no room for them; it stands in the heading.
    limits = [r.threshold for r in rules if float(x.min()) - span <= r.threshold <= float(x.max()) + span]
    low = min([float(x.min()), *limits])
    high = max([float(np.quantile(x, _TAIL)), *limits])
    median = float(np.median(x))
    is_log = low > 0 and high > _SKEWED * low and high > 4 * median
    edges = (
        np.geomspace(low, high, _BINS + 1) if is_log else np.linspace(low, high if high > low else low + 1, _BINS + 1)
    )
    edges[0], edges[-1] = min(low, edges[0]), max(high, edges[-1])
    clipped = np.clip(x, edges[0], edges[-1])
    kept = sample.kept[there]
    within = np.logical_and.reduce([np.ones(len(x), bool), *(np.asarray(rule.keeps(x), bool) for rule in rules)])
    masks = (kept, ~kept & ~within, ~kept & within)
    stayed, left, elsewhere = (np.histogram(clipped[mask], edges)[0].tolist() for mask in masks)
    known = schema.COLUMNS.get(column)
    return Score(
        column, known.description if known else "", rules, edges.tolist(), stayed, left, elsewhere, bool(is_log),
        int(decoded.sum()) - len(there), list(_along(x, there, limits)),
    )  # fmt: skip


def _along(x: npt.NDArray[np.float64], rows: npt.NDArray[np.int64], limits: Sequence[float]) -> Iterator[Examples]:
    """Yield examples along the axis: the lowest, those beside each threshold or in the middle, the highest."""
    order = np.argsort(x, kind="stable")
    n = len(order)
    spans: list[tuple[str, int, int]] = []
    for limit in sorted(set(limits)):
        at = int(np.searchsorted(x[order], limit))
        if at == 0:
            continue
        spans += [(f"just below {limit:g}", at - _EXAMPLES, at), (f"from {limit:g} on", at, at + _EXAMPLES)]
    if not spans:
        middle = n // 2
        spans.append(("in the middle", middle - _EXAMPLES // 2, middle + _EXAMPLES // 2))
    # What is beside a threshold tells most: of few samples the ends get what that leaves.
    spans += [("lowest", 0, _EXAMPLES), ("highest", n - _EXAMPLES, n)]
    shown: set[int] = set()
    taken = []
    for label, start, stop in spans:
        places = [i for i in range(max(start, 0), min(stop, n)) if i not in shown]
        shown.update(places)
        if places:
            taken.append((places, label))
    for places, label in sorted(taken):
        chosen = order[places]
        yield Examples(label, rows[chosen].tolist(), [_short(v) for v in x[chosen].tolist()])


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == round(value) else f"{value:.3g}"


def groups(sample: CatalogSample, most: int = GROUPS) -> list[tuple[str, list[Group]]]:
    """Return groups of duplicates: the largest, and, if they are others, those least like the sample that stayed.

    So many of either, at `most`.
    """
    if schema.DUPLICATE_OF not in sample.table.column_names:
        return []
    rows = np.flatnonzero(_duplicate_mask(sample) & np.isfinite(sample.numbers(schema.DUPLICATE_OF)))
    if not len(rows):
        return []
    of = np.array(sample.values(schema.DUPLICATE_OF, rows.tolist()), np.int64)
    uid = sample.table[schema.UID].to_numpy()
    order = np.argsort(uid, kind="stable")
    places = np.minimum(np.searchsorted(uid[order], of), len(uid) - 1)
    # A uid of a reference run is another sample than that of this one.
    runs, where = np.unique([v or "" for v in sample.values(schema.DUPLICATE_IN, rows.tolist())], return_inverse=True)
    found = (uid[order][places] == of) & (runs[where] == "")
    keeper = np.where(found, order[places], -1)
    similarity = sample.numbers(schema.SIMILARITY)[rows]
    keepers, inverse, sizes = np.unique(np.stack([of, where], axis=1), axis=0, return_inverse=True, return_counts=True)
    # Of NumPy 2.0 it has two dimensions.
    names = keepers, inverse.reshape(-1), sizes
    out = []
    largest = np.argsort(-names[2], kind="stable")[:most]
    out.append(("The largest groups", [_group(sample, rows, keeper, similarity, names, g) for g in largest.tolist()]))
    if np.isfinite(similarity).any():
        closest = np.argsort(np.where(np.isfinite(similarity), similarity, np.inf), kind="stable")
        chosen = list(dict.fromkeys(names[1][closest][: 20 * most].tolist()))[:most]
        if set(chosen) != set(largest.tolist()):
            title = "The least alike that left: a smaller eps brings these back first"
            out.append((title, [_group(sample, rows, keeper, similarity, names, g) for g in chosen]))
    return out


def most_alike(
    sample: CatalogSample, rows: npt.NDArray[np.int64], vectors: npt.NDArray[np.float32]
) -> list[tuple[str, list[Group]]]:
    """Return pairs of samples that stayed, those that are most alike first; each sample once.

    Parameters
    ----------
    sample : CatalogSample
        The rows.
    rows : ndarray of int64 of shape (m,)
        Those of them that are looked at.
    vectors : ndarray of float32 of shape (m, d)
        Their embeddings.
    """
    length = np.linalg.norm(vectors, axis=1)
    there = np.flatnonzero(sample.kept[rows] & np.isfinite(length) & (length > 0))
    if len(there) < 2:
        return []
    x = vectors[there] / length[there, None]
    first, second = np.triu_indices(len(there), 1)
    similarity = (x @ x.T)[first, second]
    pairs: list[Group] = []
    shown: set[int] = set()
    for at in np.argsort(-similarity, kind="stable")[: 20 * GROUPS].tolist():
        a, b = int(rows[there[first[at]]]), int(rows[there[second[at]]])
        if len(pairs) < GROUPS and not shown & {a, b}:
            shown |= {a, b}
            pairs.append(Group(a, "", Examples("", [b], [_shown(similarity[at])]), 1))
    among = "" if len(rows) == len(sample) else f", among {len(there):,} of them"
    return [(f"The most alike that stayed{among}: a larger eps takes these first", pairs)]


def _group(sample: CatalogSample, rows: Any, keeper: Any, similarity: Any, names: Any, number: int) -> Group:
    members = np.flatnonzero(names[1] == number)
    members = members[np.argsort(np.where(np.isfinite(similarity), similarity, 2)[members], kind="stable")][:_MEMBERS]
    kinds = sample.values(schema.DUPLICATE_BY, rows[members].tolist())
    notes = [
        _shown(s) if np.isfinite(s) else _BY.get(kind, "") for s, kind in zip(similarity[members], kinds, strict=True)
    ]
    first = int(members[0])
    row = int(keeper[first])
    where = sample.values(schema.DUPLICATE_IN, [int(rows[first])])[0]
    name = f"sample {names[0][number][0]}" + (f" of {where}" if where else "")
    if row >= 0:
        name = str(sample.values(schema.KEY, [row])[0])
    return Group(row if row >= 0 else None, name, Examples("", rows[members].tolist(), notes), int(names[2][number]))


def curve(stage: Mapping[str, Any], sample: CatalogSample) -> list[Mapping[str, float]]:
    """Return how many samples would stay over eps, of a semantic deduplication that was made with one eps.

    Below that eps it is an estimate, from the similarity of each sample that left to the one that stayed for it.
    """
    if schema.DUPLICATE_BY not in sample.table.column_names:
        return []
    by = np.array(sample.table[schema.DUPLICATE_BY].to_pylist(), object)
    similarity = sample.numbers(schema.SIMILARITY)[_duplicate_mask(sample) & (by == "embedding")]
    distance = 1 - similarity[np.isfinite(similarity)]
    eps, removed = float(stage["eps"]), int(stage["curve"][0]["removed"])
    if not len(distance) or eps <= 0:
        return []
    points = np.linspace(0, eps, _CURVE_POINTS + 1)
    # Similarities were rounded to float32: a copy has a distance a little below or above zero.
    share = [float(np.mean(distance <= p + 1e-6)) for p in points[:-1]] + [1.0]
    total = int(stage["samples"])
    return [
        {"eps": float(p), "removed": removed * s, "kept": total - removed * s}
        for p, s in zip(points, share, strict=True)
    ]


def leavers(manifest: Manifest, sample: CatalogSample) -> list[Examples]:
    """Return examples of what left by a rule or a stage, for each status."""
    out = []
    for status in sorted(set(manifest.counts) - {schema.STATUS_OK, schema.STATUS_DUPLICATE} - set(_BEFORE_STAGES)):
        rows = np.flatnonzero(sample.has_status(status))
        if len(rows):
            taken = rows[spread(len(rows), 2 * _EXAMPLES)].tolist()
            out.append(Examples(status, taken, [str(r or "") for r in sample.values(schema.REASON, taken)]))
    return out


def errors(sample: CatalogSample) -> list[ErrorKind]:
    """Return the reasons of what could not be read or decoded, the most frequent first."""
    rows = np.flatnonzero(sample.has_status(*_BEFORE_STAGES))
    kinds: dict[tuple[str, str], list[int]] = {}
    taken = sample.table.select([schema.STATUS, schema.REASON]).take(pa.array(rows))
    pairs = zip(taken[schema.STATUS].to_pylist(), taken[schema.REASON].to_pylist(), rows.tolist(), strict=True)
    for status, reason, row in pairs:
        kinds.setdefault((status, _NUMBER.sub("N", reason or "")), []).append(row)
    out = []
    for (status, pattern), those in sorted(kinds.items(), key=lambda kind: -len(kind[1]))[:_MAX_ERRORS]:
        reasons = set(sample.values(schema.REASON, those))
        reason = str(reasons.pop()) if len(reasons) == 1 else pattern
        out.append(ErrorKind(status, reason, len(those), [str(k) for k in sample.values(schema.KEY, those[:3])]))
    return out


def _shown(similarity: float) -> str:
    """Return a similarity with as many digits as tell it from 1; 1 is exactly that."""
    return next((t for d in range(3, 7) if not (t := f"{similarity:.{d}f}").startswith("1")), f"{similarity:.6f}")
