"""fsspec filesystems by URL: how they are opened, which of their faults pass, and how the others are told.

Retries are made here alone. botocore's and s3fs' own are switched off, for they would multiply: a server
that is gone would be asked 150 times.
"""

from __future__ import annotations

import errno
import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeVar

import fsspec

from imgcurate.errors import ConfigError, ImgcurateError

__all__ = [
    "ATTEMPTS",
    "StatusError",
    "StorageError",
    "StorageOptions",
    "filesystem",
    "protocol_of",
    "retry",
    "shown_url",
]

StorageOptions = Mapping[str, Any]
_T = TypeVar("_T")
logger = logging.getLogger(__name__)

ATTEMPTS: Final = 10
_FIRST_DELAY_S: Final = 0.1
_LONGEST_DELAY_S: Final = 30.0
_STALL_S: Final = 30.0
_EXTRAS: Final = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
# Listings that are kept hide what was written since, by others or by a run that was killed.
_KEEP_LISTINGS: Final = frozenset({"s3", "s3a", "gs", "gcs", "http", "https"})
_WORTH_A_RETRY: Final = frozenset({408, 425, 429})
_NOT_THERE: Final = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
# Wrong addresses, options and names: ValueError is also what libraries raise for certificates.
_WRONG_USE: Final = (ValueError, TypeError, AttributeError, LookupError, NotImplementedError)
_REDIRECTS: Final = "TooManyRedirects"
_NO_CREDENTIALS: Final = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"}
)
_SECRETS: Final = re.compile(r"(?i)(?<=[?&])([^=&\s]*(?:sig|token|secret|key|credential|password)[^=&\s]*)=[^&\s'\")]+")
_USER: Final = re.compile(r"(?<=://)[^/@\s]+@")


class StorageError(ImgcurateError):
    """A file that could not be read or written, after all retries."""


class StatusError(OSError):
    """An HTTP answer that is no success.

    Parameters
    ----------
    status : int
        Its status.
    reason : str
        The server's words for it.
    retry_after_s : float
        How long the server asks to wait; 0 if it does not.
    """

    def __init__(self, status: int, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(f"the server answers {status} {reason}".rstrip())
        self.status, self.retry_after_s = status, retry_after_s


def protocol_of(url: str) -> str:
    """Return the protocol of a URL, such as ``s3``."""
    return url.split("://", 1)[0].lower()


def shown_url(text: str) -> str:
    """Return a URL, or a text with URLs, without passwords and signatures.

    Examples
    --------
    >>> shown_url("https://me:word@host/a.tar?X-Amz-Signature=12ab&part=1")
    'https://host/a.tar?X-Amz-Signature=...&part=1'
    """
    return _SECRETS.sub(r"\1=...", _USER.sub("", text))


def filesystem(url: str, storage_options: StorageOptions | None) -> tuple[Any, str]:
    """Return the fsspec filesystem of a URL, and the path in it.

    Raises
    ------
    ConfigError
        If a package is missing, or the options are not those of the filesystem.
    """
    protocol, options = protocol_of(url), dict(storage_options or {})
    if protocol in _KEEP_LISTINGS:
        options.setdefault("use_listings_cache", False)
    if protocol in ("s3", "s3a"):
        once = {"retries": {"total_max_attempts": 1, "mode": "standard"}}
        options["config_kwargs"] = once | dict(options.get("config_kwargs") or {})
        # Parts of 50 MiB, each in memory, of an object that is written.
        options.setdefault("max_concurrency", 4)
    try:
        if protocol in ("http", "https") and "timeout" not in (options.get("client_kwargs") or {}):
            options["timeout"] = _timeout(options.get("timeout", _STALL_S))
        fs, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as exc:
        cure = f": pip install 'imgcurate[{_EXTRAS[protocol]}]'" if protocol in _EXTRAS else f" ({exc})"
        raise ConfigError(f"{protocol}:// needs packages that are not installed{cure}") from exc
    except (ValueError, TypeError) as exc:
        raise ConfigError(f"{shown_url(url)}: {shown_url(str(exc))}") from exc
    if protocol in ("s3", "s3a"):
        fs.retries = 1
    return fs, path


def _timeout(seconds: Any) -> Any:
    """Return aiohttp's timeout: a server may take any time for a whole file, but not for the next bytes of it."""
    import aiohttp

    if isinstance(seconds, (int, float)):
        return aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
    return seconds


def retry(
    call: Callable[[], _T],
    what: str,
    *,
    attempts: int = ATTEMPTS,
    progress: Callable[[], int] = lambda: 0,
    wanted: Callable[[], bool] = lambda: True,
) -> _T:
    """Call until it succeeds, waiting longer each time; what cannot pass by itself is not tried again.

    Parameters
    ----------
    call : callable
        What to do.
    what : str
        Begins the message of the error: ``cannot read s3://...``.
    attempts : int
        Failures in a row that end it.
    progress : callable
        How far the call has come; failures count anew where it grew.
    wanted : callable
        Whether anybody still waits for the result: else the first failure ends it.

    Raises
    ------
    StorageError
        If it cannot succeed, or failed `attempts` times, in one line with the cause.
    """
    failures, reached, delay_s = 0, progress(), _FIRST_DELAY_S
    while True:
        try:
            return call()
        except ImgcurateError:
            raise
        except Exception as exc:
            if _is_permanent(exc):
                raise StorageError(f"{shown_url(what)}: {_words(exc)}") from exc
            if progress() > reached:
                failures, reached, delay_s = 0, progress(), _FIRST_DELAY_S
            failures += 1
            if failures >= attempts or not wanted():
                raise StorageError(f"{shown_url(what)}: {_words(exc)} ({failures} attempts)") from exc
            pause_s = max(delay_s * (0.5 + random.random()), _retry_after_s(exc))  # noqa: S311 - jitter
            logger.info("%s: %s; trying again in %.1f s", shown_url(what), _words(exc), pause_s)
            time.sleep(min(pause_s, _LONGEST_DELAY_S))
            delay_s *= 2


def _is_permanent(exc: Exception) -> bool:
    if isinstance(exc, TimeoutError):
        return False
    if (
        getattr(exc, "errno", None) == errno.ENOSPC
        or isinstance(exc, _NOT_THERE)
        or type(exc).__name__ in (*_NO_CREDENTIALS, _REDIRECTS)
    ):
        return True
    status = _status(exc)
    if status is not None:
        return 400 <= status < 500 and status not in _WORTH_A_RETRY
    return isinstance(exc, _WRONG_USE) and not isinstance(exc, OSError)


def _status(exc: BaseException) -> int | None:
    """Return the HTTP status behind an error of s3fs, gcsfs, aiohttp or of ours."""
    for each in _causes(exc):
        response = getattr(each, "response", None)
        if isinstance(response, Mapping):
            return _number(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    # Only of the error itself: aiohttp's causes have codes that no server sent.
    return _number(exc.status if hasattr(exc, "status") else getattr(exc, "code", None))


def _number(status: Any) -> int | None:
    return int(str(status)) if str(status).isdigit() and int(str(status)) >= 400 else None


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    while exc is not None:
        yield exc
        exc = exc.__cause__


def _retry_after_s(exc: BaseException) -> float:
    return float(getattr(exc, "retry_after_s", 0.0))


def _words(exc: BaseException) -> str:
    """Return the cause of a failure in one line, with what to do where that is known."""
    name, status = type(exc).__name__, _status(exc)
    text = shown_url(" ".join(str(exc).split()))
    if name in _NO_CREDENTIALS:
        return (
            f"{text or name}; credentials are looked for in storage_options, the environment (AWS_ACCESS_KEY_ID "
            "...), ~/.aws and the role of the instance; anon: true reads what is public"
        )
    if isinstance(exc, FileNotFoundError):
        # fsspec says the same of a server that cannot be reached, and keeps why.
        why = exc.__cause__ if isinstance(exc.__cause__, OSError) else None
        return f"no such file{f' ({_words(why)})' if why is not None else ''}"
    if isinstance(exc, PermissionError) or status in (401, 403):
        return f"access denied ({text or status}): do the credentials in use allow it?"
    if name == _REDIRECTS:
        return "the server redirects in a circle"
    if isinstance(exc, TimeoutError):
        return f"no answer in time{f' ({text})' if text else ''}"
    return text or name
