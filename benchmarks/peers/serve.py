"""What the drivers of embedding peers share: each loads its model, says so, and then works when it is told to.

A driver is run by the Python of an environment of its own and imports nothing of imgcurate. On its standard output it
writes ``ready``, and after each line on its standard input the number of images that it embedded. Whatever the peer
prints goes to standard error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

__all__ = ["check", "serve"]

# The protocol has the real standard output; what a library prints must not get into it.
_answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


def serve(work: Callable[[], int]) -> None:
    """Say that all is loaded; then do the work once per line, and answer with how many images it embedded."""
    print("ready", file=_answers)
    for _ in sys.stdin:
        print(work(), file=_answers)


def check(embeddings: object) -> int:
    """Return how many embeddings there are, (n, d) of any float type; an error if one is not of unit length."""
    import numpy as np

    x = np.asarray(embeddings, dtype=np.float32)
    if not np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-2):
        raise ValueError("embeddings of unit length were expected")
    return len(x)
