"""Every column of imgcurate's frames: name, type and meaning.

Arrow types are the source of truth, because the catalog is Parquet; the pandas and cudf dtypes and
the ``meta`` that Dask wants follow from them. No other module spells a column's name as a string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa

from imgcurate.errors import ConfigError

__all__ = [
    "AESTHETIC_SCORE",
    "AESTHETIC_SCORE_RAW",
    "ASPECT_RATIO",
    "BRIGHTNESS",
    "CAPTION_SIMILARITY",
    "CATALOG_ORDER",
    "CHANNELS",
    "CLUSTER",
    "COLORFULNESS",
    "COLUMNS",
    "CONTENT_HASH",
    "CONTRAST",
    "DUPLICATE_BY",
    "DUPLICATE_IN",
    "DUPLICATE_OF",
    "EMBEDDING",
    "ENCODER",
    "ENTROPY",
    "EXT",
    "FILES",
    "HEIGHT",
    "INDEX_COLUMNS",
    "KEY",
    "LARGEST_FIRST",
    "MEMBERS",
    "NBYTES",
    "NSFW_SCORE",
    "OFFSET",
    "PHASE",
    "PHASH",
    "PIXEL_HASH",
    "REASON",
    "RESERVED_STATUSES",
    "SHARD",
    "SHARPNESS",
    "SIMILARITY",
    "SPANS",
    "STATUS",
    "STATUS_AESTHETIC",
    "STATUS_CAPTION",
    "STATUS_COLUMN",
    "STATUS_DECODER_CRASH",
    "STATUS_DECODE_ERROR",
    "STATUS_DUPLICATE",
    "STATUS_FAILED",
    "STATUS_NO_IMAGE",
    "STATUS_NSFW",
    "STATUS_OK",
    "STATUS_QUALITY",
    "STATUS_READ_ERROR",
    "STATUS_TAR_ERROR",
    "STATUS_TOO_SMALL",
    "UID",
    "UID_SHARD_BITS",
    "UNREADABLE",
    "WIDTH",
    "Column",
    "arrow_schema",
    "arrow_type",
    "make_meta",
    "make_uid",
    "pandas_dtype",
    "pandas_metadata",
    "split_uid",
]

UID: Final = "uid"
SHARD: Final = "shard"
KEY: Final = "key"
EXT: Final = "ext"
MEMBERS: Final = "members"
FILES: Final = "files"
SPANS: Final = "spans"
OFFSET: Final = "offset"
NBYTES: Final = "nbytes"
WIDTH: Final = "width"
HEIGHT: Final = "height"
STATUS: Final = "status"
REASON: Final = "reason"
ASPECT_RATIO: Final = "aspect_ratio"
CHANNELS: Final = "channels"
SHARPNESS: Final = "sharpness"
BRIGHTNESS: Final = "brightness"
CONTRAST: Final = "contrast"
ENTROPY: Final = "entropy"
COLORFULNESS: Final = "colorfulness"
CONTENT_HASH: Final = "content_hash"
PIXEL_HASH: Final = "pixel_hash"
PHASH: Final = "phash"
EMBEDDING: Final = "embedding"
AESTHETIC_SCORE: Final = "aesthetic_score"
AESTHETIC_SCORE_RAW: Final = "aesthetic_score_raw"
NSFW_SCORE: Final = "nsfw_score"
CAPTION_SIMILARITY: Final = "caption_similarity"
CLUSTER: Final = "cluster"
DUPLICATE_OF: Final = "duplicate_of"
DUPLICATE_BY: Final = "duplicate_by"
DUPLICATE_IN: Final = "duplicate_in"
SIMILARITY: Final = "similarity"
ENCODER: Final = "encoder"
PHASE: Final = "phase"

STATUS_OK: Final = "ok"
STATUS_TAR_ERROR: Final = "tar_error"
STATUS_NO_IMAGE: Final = "no_image"
STATUS_READ_ERROR: Final = "read_error"
STATUS_DECODE_ERROR: Final = "decode_error"
STATUS_QUALITY: Final = "quality"
STATUS_DECODER_CRASH: Final = "decoder_crash"
STATUS_TOO_SMALL: Final = "too_small"
STATUS_FAILED: Final = "failed"
STATUS_AESTHETIC: Final = "aesthetic"
STATUS_NSFW: Final = "nsfw"
STATUS_CAPTION: Final = "caption"
STATUS_COLUMN: Final = "column"
STATUS_ZERO_SHOT: Final = "zero_shot"
STATUS_DUPLICATE: Final = "duplicate"
UNREADABLE: Final = frozenset(
    {STATUS_TAR_ERROR, STATUS_NO_IMAGE, STATUS_READ_ERROR, STATUS_DECODE_ERROR, STATUS_DECODER_CRASH, STATUS_FAILED}
)
"""Statuses of samples whose image nobody has seen."""
RESERVED_STATUSES: Final = UNREADABLE | {STATUS_OK, STATUS_DUPLICATE, STATUS_TOO_SMALL}
"""Statuses that no stage gives to what it drops by a rule or a mask."""

UID_SHARD_BITS: Final = 32
LARGEST_FIRST: Final = (f"-{WIDTH}*{HEIGHT}", f"-{NBYTES}")
"""What decides first, on the command line and by hashes, which of several duplicates stays."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the frame.

    Attributes
    ----------
    name : str
        The column's name.
    type : pa.DataType
        Its Arrow type.
    description : str
        What it holds, with unit and range.
    """

    name: str
    type: pa.DataType
    description: str


COLUMNS: Final[Mapping[str, Column]] = {
    c.name: c
    for c in (
        Column(UID, pa.int64(), "input shard number << 32 | position of the sample in its shard"),
        Column(SHARD, pa.string(), "URL of the input shard"),
        Column(KEY, pa.string(), "WebDataset __key__: member path up to the first dot of its base name"),
        Column(EXT, pa.string(), "extension of the image member, lower case, without the leading dot"),
        Column(MEMBERS, pa.list_(pa.string()), "extensions of all members, in the order of the tar"),
        Column(FILES, pa.list_(pa.string()), "files of the sample, image first, if the shard is a folder; else null"),
        Column(
            SPANS, pa.list_(pa.int64()), "byte spans of the sample in its shard, or files: start, length, start, ..."
        ),
        Column(OFFSET, pa.int64(), "byte offset of the image member's data in its shard; -1 without an image"),
        Column(NBYTES, pa.int64(), "bytes of the image member as stored"),
        Column(WIDTH, pa.int32(), "pixels, EXIF orientation applied; 0 if unknown"),
        Column(HEIGHT, pa.int32(), "pixels, EXIF orientation applied; 0 if unknown"),
        Column(STATUS, pa.string(), "'ok', or why the sample left"),
        Column(REASON, pa.string(), "the status in words, with the number that decided; '' if ok"),
        Column(ASPECT_RATIO, pa.float32(), "longer side / shorter side, >= 1; null where no image decoded"),
        Column(CHANNELS, pa.int32(), "as stored: 1 gray, 2 gray + alpha, 3 colour, 4 colour + alpha, CMYK; 0 unknown"),
        Column(SHARPNESS, pa.float32(), ">= 0, higher is sharper: variance of the Laplacian at 224 pixels a side"),
        Column(BRIGHTNESS, pa.float32(), "[0, 255], mean luma, higher is brighter"),
        Column(CONTRAST, pa.float32(), "[0, 127.5], standard deviation of the luma"),
        Column(ENTROPY, pa.float32(), "[0, 8] bits, of the histogram of the luma"),
        Column(COLORFULNESS, pa.float32(), "0 gray, 33 moderately, 109 extremely colourful (Hasler and Suesstrunk)"),
        Column(CONTENT_HASH, pa.string(), "BLAKE2b of the image as stored, 32 hex digits; null where none decoded"),
        Column(PIXEL_HASH, pa.string(), "BLAKE2b of the decoded pixels at full size and their shape, 32 hex digits"),
        Column(PHASH, pa.int64(), "64-bit perceptual hash (pHash); null where no image decoded, or it is nearly flat"),
        Column(EMBEDDING, pa.list_(pa.float32()), "(d,) float32, unit L2 norm; null where no image decoded"),
        Column(ENCODER, pa.string(), "identity of the encoder that made the embedding; null where there is none"),
        Column(AESTHETIC_SCORE, pa.float32(), "[0, 1], higher is better: LAION's 1..10 scale divided by ten"),
        Column(AESTHETIC_SCORE_RAW, pa.float32(), "LAION's own scale, about 1..10, higher is better, unclipped"),
        Column(NSFW_SCORE, pa.float32(), "[0, 1], probability that the image is not safe for work"),
        Column(CAPTION_SIMILARITY, pa.float32(), "[-1, 1], cosine of image and caption; null without a caption"),
        Column(CLUSTER, pa.int32(), "index of the nearest k-means centroid; null where no embedding"),
        Column(DUPLICATE_OF, pa.int64(), "uid of the kept sample that this one duplicates; null if none"),
        Column(DUPLICATE_IN, pa.string(), "run folder that duplicate_of belongs to; null if it is this one"),
        Column(
            DUPLICATE_BY, pa.string(), "how alike they are: 'content', 'pixels', 'phash' or 'embedding'; null if none"
        ),
        Column(
            SIMILARITY, pa.float32(), "cosine similarity to the sample named by duplicate_of; null if none or unknown"
        ),
        Column(PHASE, pa.int32(), "phase of the run in which the sample left, 0 the one that decodes; null if kept"),
    )
}

INDEX_COLUMNS: Final = (
    UID, SHARD, KEY, EXT, MEMBERS, FILES, SPANS, OFFSET, NBYTES, WIDTH, HEIGHT, STATUS, REASON,
)  # fmt: skip
CATALOG_ORDER: Final = tuple(COLUMNS)

_LIST_NAME: Final = re.compile(r"list<(?:item|element): (string|int64|float|double)>\[pyarrow\]")
# Every row has these; any other integer or boolean may be null.
_NEVER_NULL: Final = frozenset({UID, OFFSET, NBYTES, WIDTH, HEIGHT})


def zero_shot_column(label: str) -> str:
    """Return the column of a label's probability, a float32 in [0, 1]."""
    return f"{STATUS_ZERO_SHOT}_{label}"


def arrow_type(name: str, extra: Mapping[str, pa.DataType] | None = None) -> pa.DataType:
    """Return the Arrow type of a column.

    Parameters
    ----------
    name : str
        A column of :data:`COLUMNS` or of `extra`.
    extra : mapping of str to pa.DataType, optional
        Columns that custom stages add.

    Raises
    ------
    ConfigError
        If the column is in neither.
    """
    if extra and name in extra:
        return extra[name]
    if name in COLUMNS:
        return COLUMNS[name].type
    raise ConfigError(f"unknown column {name!r}: expected one of {', '.join(COLUMNS)}")


def arrow_schema(names: Iterable[str], extra: Mapping[str, pa.DataType] | None = None) -> pa.Schema:
    """Return the Arrow schema of `names`, in the catalog's canonical order, custom columns last."""
    known = [n for n in CATALOG_ORDER if n in (wanted := set(names))]
    custom = [n for n in dict.fromkeys(names) if n not in COLUMNS and n in wanted]
    return pa.schema([pa.field(n, arrow_type(n, extra)) for n in [*known, *custom]])


def pandas_dtype(name: str, type_: pa.DataType) -> Any:
    """Return the pandas dtype that holds an Arrow column without loss.

    Lists keep their Arrow layout (Dask corrupts object columns of arrays), integers that may be
    null use pandas' masked integers, strings the default string dtype.
    """
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return pd.StringDtype(na_value=np.nan)
    if name in _NEVER_NULL or pa.types.is_floating(type_):
        return type_.to_pandas_dtype()
    if pa.types.is_boolean(type_):
        return pd.BooleanDtype()
    if pa.types.is_integer(type_):
        masked = np.dtype(type_.to_pandas_dtype()).name.replace("u", "U").replace("int", "Int")
        return pd.api.types.pandas_dtype(masked)
    return pd.ArrowDtype(type_)


@pd.api.extensions.register_extension_dtype
class _ListDtype(pd.ArrowDtype):
    """Lists by the name that pandas gives their type, and does not know again itself.

    Frames that went through Parquet files or from worker to worker name it so.
    """

    @classmethod
    def construct_from_string(cls, string: str) -> pd.ArrowDtype:
        """Return the type of a name such as ``list<item: string>[pyarrow]``."""
        found = _LIST_NAME.fullmatch(string) if isinstance(string, str) else None
        if found is None:
            raise TypeError(f"{string!r} is no list of a known type")
        return pd.ArrowDtype(pa.list_(pa.type_for_alias(found[1])))


def pandas_metadata(schema: pa.Schema) -> dict[str, str]:
    """Return the metadata by which pandas reads whole numbers and booleans that may be null without loss.

    As floats, which pandas takes by itself where some are null, hashes of 64 bits lose their last ones, and the parts
    of a catalog differ in type.
    """
    columns = [
        {
            "name": f.name,
            "field_name": f.name,
            "pandas_type": str(f.type),
            "numpy_type": str(pandas_dtype(f.name, f.type)),
            "metadata": None,
        }
        for f in schema
        if f.name not in _NEVER_NULL and (pa.types.is_integer(f.type) or pa.types.is_boolean(f.type))
    ]
    return {"pandas": json.dumps({"index_columns": [], "column_indexes": [], "columns": columns})} if columns else {}


def make_meta(schema: pa.Schema) -> pd.DataFrame:
    """Return the empty pandas frame that Dask takes as ``meta`` for `schema`."""
    return pd.DataFrame({f.name: pd.Series([], dtype=pandas_dtype(f.name, f.type)) for f in schema})


def make_uid(shard_number: int, position: int) -> int:
    """Return the uid of the sample at `position` (0-based) of input shard `shard_number` (0-based)."""
    return shard_number << UID_SHARD_BITS | position


def split_uid(uid: int) -> tuple[int, int]:
    """Return (shard number, position in the shard) of a uid."""
    return uid >> UID_SHARD_BITS, uid & (1 << UID_SHARD_BITS) - 1
