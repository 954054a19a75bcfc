"""The exceptions that imgcurate raises on purpose.

::

    ImgcurateError                exit code 1
    ├── ConfigError               exit code 2: parameters, stages or columns that cannot work
    │   ├── InputError            an input that is missing or of an unknown kind
    │   ├── DeviceError           a GPU was asked for and is not usable
    │   └── EncoderMismatchError  a head was given embeddings of another model
    ├── TarError                  bytes that are not a tar archive, with the offset
    ├── WeightsError              model weights missing, damaged or out of reach
    ├── CatalogError              a run's record is damaged or belongs to another run
    └── ClusterError              Dask workers died or could not be reached
        └── PartitionsError       partitions failed for good, more than may fail

A bad *sample* never raises: it becomes a row whose ``status`` and ``reason`` say what was wrong.
"""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable, Mapping
from typing import Final

__all__ = [
    "CatalogError",
    "ClusterError",
    "ConfigError",
    "DeviceError",
    "EncoderMismatchError",
    "ImgcurateError",
    "InputError",
    "PartitionsError",
    "TarError",
    "WeightsError",
    "nearest",
    "printable",
]


def printable(text: str) -> str:
    r"""Return text of strangers for a message: what a terminal would obey, not show, becomes an escape (``\x1b``)."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class ImgcurateError(Exception):
    """Base of every error that imgcurate raises on purpose."""

    exit_code = 1


class ConfigError(ImgcurateError, ValueError):
    """Parameters, stages or columns that cannot work; raised before any work is done."""

    exit_code = 2


class InputError(ConfigError):
    """An input that does not exist or is of an unknown kind."""


class DeviceError(ConfigError):
    """A GPU was asked for and is not usable."""


class EncoderMismatchError(ConfigError):
    """A head was given embeddings of a model that it was not trained on."""


class TarError(ImgcurateError):
    """Bytes that are not a valid tar archive.

    Parameters
    ----------
    message : str
        What is wrong, in words.
    offset : int
        Byte offset in the archive at which the damage was met.
    """

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message, offset)
        self.message = message
        self.offset = offset

    def __str__(self) -> str:
        """Return the message with the offset."""
        return f"{self.message} at byte {self.offset}"


class WeightsError(ImgcurateError):
    """Model weights that are missing, damaged or out of reach."""


class CatalogError(ImgcurateError):
    """A run's record that is damaged or belongs to another run."""


class ClusterError(ImgcurateError):
    """Dask workers that died or could not be reached."""


_DISK_FULL: Final = os.strerror(errno.ENOSPC)


class PartitionsError(ClusterError):
    """Partitions that failed for good, more than were allowed to.

    Parameters
    ----------
    phase : str
        Which work failed.
    failed : mapping of int to str
        Partition number -> reason, at least one.
    total : int
        How many partitions were to be done.
    complete : bool
        Whether all that could be done was done; else there may be more.
    """

    def __init__(self, phase: str, failed: Mapping[int, str], total: int, complete: bool = True) -> None:
        super().__init__(phase, failed, total, complete)
        self.phase, self.failed, self.total, self.complete = phase, dict(failed), total, complete

    def __str__(self) -> str:
        """Say how many failed, which one first and why, and what can be done."""
        number, reason = next(iter(self.failed.items()))
        n = len(self.failed)
        again = "to try just these again" if self.complete else "to go on"
        if _DISK_FULL in reason:
            # To go on without them would be to lose samples for want of room.
            return (
                f"{self.phase}: {n} of {self.total} partitions failed, the first is partition {number}: {reason}; what "
                "was finished is kept: make room, and run again to go on"
            )
        most = f"with --max-failed {n}" if self.complete else "with a higher --max-failed"
        return (
            f"{self.phase}: {n} of {self.total} partitions failed, the first is partition {number}: {reason}; what was "
            f"finished is kept: run again {again}, or {most} to go on without them"
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" for the known names that are near, else the list of them."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
