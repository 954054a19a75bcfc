"""How far partitions are that are being worked on: workers tell it every few seconds, and who shows progress hears it.

Nothing depends on it: what is told goes by the scheduler's events, and is gone once it was heard.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Final

from distributed import Client, get_worker

__all__ = ["Hear", "Tell", "heard", "teller"]

Tell = Callable[[int], None]
"""Called with a number of samples that are done since the last call."""
Hear = Callable[[float, int], None]
"""Called with how many partitions those in work come to, as their done shares together, and how many samples."""

_EVERY_S: Final = 2.0
logger = logging.getLogger(__name__)


def teller(topic: str, number: int, rows: int) -> Tell:
    """Return what tells how far this worker is with a partition; nothing where there is nobody to tell.

    Parameters
    ----------
    topic : str
        From :func:`heard`; "" where nobody listens.
    number : int
        The partition.
    rows : int
        How many samples it has.
    """
    try:
        worker = get_worker() if topic and rows else None
    except ValueError:
        worker = None
    done, last, told = 0, time.monotonic(), False

    def tell(samples: int) -> None:
        nonlocal done, last, told
        done += samples
        if worker is not None and (time.monotonic() - last >= _EVERY_S or (told and done >= rows)):
            last, told = time.monotonic(), True
            worker.log_event(topic, {"number": number, "done": done, "rows": rows})

    return tell


@contextlib.contextmanager
def heard(client: Client, hear: Hear | None) -> Iterator[str]:
    """Yield the topic under which workers tell how far they are; "" if nobody hears it.

    Parameters
    ----------
    client : distributed.Client
        The cluster.
    hear : callable, optional
        Who listens; called in the client's own thread.
    """
    if hear is None:
        yield ""
        return
    topic = f"imgcurate-{uuid.uuid4().hex}"
    within: dict[int, tuple[int, int]] = {}
    lock = threading.Lock()

    def handler(event: tuple[float, Any]) -> None:
        message = event[1]
        with lock:
            within[message["number"]] = message["done"], message["rows"]
            if message["done"] >= message["rows"]:
                # It is about to end, and is told as a whole one then.
                del within[message["number"]]
                return
            in_work = list(within.values())
        try:
            hear(sum(done / rows for done, rows in in_work), sum(done for done, _ in in_work))
        except Exception:
            # Whatever a display raises: what is shown must not end a run, nor the thread that hears of it.
            logger.debug("progress cannot be shown", exc_info=True)

    client.subscribe_topic(topic, handler)
    try:
        yield topic
    finally:
        # A client that lost its scheduler has nothing to leave: the error that ended the run is the one to tell.
        with contextlib.suppress(Exception):
            client.unsubscribe_topic(topic)
