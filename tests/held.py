"""A stage that waits, so that a run can be stopped while it is at work, however fast the machine is."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

from imgcurate import ImageBatch, PixelView, ProcessingStage

HELD_BY = "IMGCURATE_TEST_HELD_BY"
# A worker that is to end waits for its task.
_LONGEST_S = 4.0


class Hold(ProcessingStage):
    """Wait once two parts of the catalog are written, as long as the file is there that a variable names."""

    name = "hold"
    needs = ("image",)
    views = (PixelView(8, 8),)

    def process(self, batch: ImageBatch) -> ImageBatch:
        hold = Path(os.environ[HELD_BY])
        with contextlib.suppress(FileNotFoundError):
            catalog = Path(hold.read_text())
            end = time.monotonic() + _LONGEST_S
            while hold.exists() and len(list(catalog.glob("part-*.parquet"))) >= 2 and time.monotonic() < end:
                time.sleep(0.05)
        return batch


def write_run(folder: Path, inputs: Path) -> Path:
    """Write the file of a run that waits, for ``imgcurate run``."""
    path = folder / "held.yaml"
    path.write_text(
        f"inputs: {inputs}/*.tar\nstages:\n  - ImageReaderStage\n  - held.Hold\n"
        "  - ImageEmbeddingStage: {model: tiny-image}\n  - SemanticDedupStage\n  - ImageWriterStage\n"
    )
    return path


def environment(held_by: Path, out: Path, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables of a process whose run into a folder waits for a file to go; make the file."""
    held_by.write_text(str(out / "catalog"))
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), env.get("PYTHONPATH")]))
    return {**env, HELD_BY: str(held_by), "PYTHONPATH": path}
