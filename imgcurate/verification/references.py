"""Whether what duplicates name is kept: uids -> yes or no, from bitmaps of the parts that hold them.

A part's rows are a bit each, which every process reads once and keeps while there is room, so the cost is that
of two columns of the catalog, whoever names whom.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgcurate import schema
from imgcurate.catalog import Catalog, Manifest
from imgcurate.errors import ImgcurateError
from imgcurate.partitions import Partitions
from imgcurate.verification.checks import Faults

__all__ = ["Record", "check_references", "partitions_of"]

_ROOM_BYTES: Final = 256 * 1024**2
_POSITION: Final = (1 << schema.UID_SHARD_BITS) - 1
_Ints = npt.NDArray[np.int64]
_Bitmaps = dict[int, npt.NDArray[np.uint8]]
_Key = tuple[str, str, int]


class _Cache:
    """The bitmaps that a process keeps, those that were used last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[_Key, _Bitmaps] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    def get(self, key: _Key) -> _Bitmaps | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: _Key, bitmaps: _Bitmaps) -> None:
        with self._lock:
            if key not in self._kept:
                self._kept[key] = bitmaps
                self._nbytes += _nbytes(bitmaps)
            while self._nbytes > _ROOM_BYTES and len(self._kept) > 1:
                self._nbytes -= _nbytes(self._kept.popitem(last=False)[1])


def _nbytes(bitmaps: _Bitmaps) -> int:
    return sum(b.nbytes for b in bitmaps.values())


_cache: Final = _Cache()


def partitions_of(manifest: Manifest) -> Partitions:
    """Return how the inputs of a run are divided into the parts of its catalog."""
    inputs = manifest.config["inputs"]
    sources = [manifest.source, *manifest.config["stages"]]
    per_part = next(s["files_per_partition"] for s in sources if "files_per_partition" in s)
    return Partitions.divide([i.get("nbytes") for i in inputs], per_part, manifest.increments)


@dataclass(frozen=True)
class Record:
    """A run in which duplicates may name rows.

    Attributes
    ----------
    catalog : Catalog
        Its catalog.
    partitions : Partitions
        Where the rows of an input are.
    never : tuple of str
        Statuses of rows that no duplicate may name; None stands for all but ``ok``.
    token : str
        Distinguishes this check from others in the same process.
    """

    catalog: Catalog
    partitions: Partitions
    never: tuple[str, ...] | None
    token: str

    def names_kept(self, uids: _Ints) -> npt.NDArray[np.bool_]:
        """Return whether each uid is that of a row which duplicates may name."""
        order = np.argsort(uids)
        good = np.zeros(len(uids), bool)
        for number, here in _by_input(uids[order]):
            part = int(self.partitions.part_of(np.array([number]))[0])
            bitmap = self._bitmaps(part).get(number) if part >= 0 else None
            if bitmap is not None:
                good[order[here]] = _look_up(bitmap, uids[order[here]] & _POSITION)
        return good

    def _bitmaps(self, part: int) -> _Bitmaps:
        key = (self.token, self.catalog.folder, part)
        found = _cache.get(key)
        if found is None:
            found = self._read(part)
            _cache.put(key, found)
        return found

    def _read(self, part: int) -> _Bitmaps:
        table = self.catalog.read(part, [schema.UID, schema.STATUS])
        uids, status = table[schema.UID].to_numpy().astype(np.int64), table[schema.STATUS]
        if self.never is None:
            may = pc.equal(status, schema.STATUS_OK)
        else:
            may = pc.invert(pc.is_in(status, pa.array(self.never, pa.string())))
        uids = np.sort(uids[may.fill_null(False).to_numpy()])
        bitmaps = {}
        for number, here in _by_input(uids):
            positions = uids[here] & _POSITION
            # A damaged part may hold any number.
            bits = np.zeros(min(int(positions.max()) + 1, len(table)), bool)
            bits[positions[positions < len(bits)]] = True
            bitmaps[number] = np.packbits(bits)
        return bitmaps


def _by_input(uids: _Ints) -> Iterator[tuple[int, slice]]:
    """Return (number of the input, where its uids are) of sorted uids."""
    numbers, starts = np.unique(uids >> schema.UID_SHARD_BITS, return_index=True)
    stops = np.append(starts, len(uids))[1:]
    return ((n, slice(a, b)) for n, a, b in zip(numbers.tolist(), starts.tolist(), stops.tolist(), strict=True))


def _look_up(bitmap: npt.NDArray[np.uint8], positions: _Ints) -> npt.NDArray[np.bool_]:
    byte = positions >> 3
    inside = byte < len(bitmap)
    found = bitmap[np.where(inside, byte, 0)] >> (7 - (positions & 7)).astype(np.uint8) & 1
    both: npt.NDArray[np.bool_] = inside & found.astype(bool)
    return both


def check_references(part: int, *, record: Record, others: Sequence[Record]) -> dict[str, Any]:
    """Check that the duplicates of a part name rows that are kept, in this run or in one of `others`.

    Returns
    -------
    dict
        ``faults``, ``n_faults``, how many were ``checked``, and of how many the run is ``unknown``.
    """
    faults = Faults()
    try:
        table = _duplicates(record.catalog, part)
    except (ImgcurateError, pa.ArrowException, KeyError) as exc:
        faults.add("damaged", f"catalog part {part}", " ".join(str(exc).split()))
        return faults.result(checked=0, unknown=0)
    folders = table[schema.DUPLICATE_IN].fill_null("").to_pylist()
    named = table[schema.DUPLICATE_OF].to_numpy().astype(np.int64)
    runs = {"": record} | {other.catalog.folder: other for other in others}
    checked = unknown = 0
    for folder in sorted(set(folders)):
        here = np.array([f == folder for f in folders], bool)
        if folder not in runs:
            unknown += int(here.sum())
            continue
        checked += int(here.sum())
        try:
            good = runs[folder].names_kept(named[here])
        except (ImgcurateError, pa.ArrowException) as exc:
            faults.add("reference", folder or "catalog", f"cannot be read: {' '.join(str(exc).split())}")
            continue
        uids = table[schema.UID].to_numpy()[here]
        where = f" of {folder}" if folder else ""
        for uid, other in zip(uids[~good].tolist(), named[here][~good].tolist(), strict=True):
            faults.add(
                "reference", f"catalog part {part}", f"uid {uid} is a duplicate of {other}{where}, which is not kept"
            )
    return faults.result(checked=checked, unknown=unknown)


def _duplicates(catalog: Catalog, part: int) -> pa.Table:
    columns = [schema.UID, schema.STATUS, schema.DUPLICATE_OF]
    try:
        table = catalog.read(part, [*columns, schema.DUPLICATE_IN])
    except (ImgcurateError, KeyError):
        table = catalog.read(part, columns)
        table = table.append_column(schema.DUPLICATE_IN, pa.nulls(len(table), pa.string()))
    of_one = pc.and_(pc.equal(table[schema.STATUS], schema.STATUS_DUPLICATE), pc.is_valid(table[schema.DUPLICATE_OF]))
    return table.filter(of_one)
