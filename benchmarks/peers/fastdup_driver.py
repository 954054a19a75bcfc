"""Run fastdup on vectors, in an environment of its own: it needs another NumPy than imgcurate.

    python -m venv V && V/bin/pip install -r benchmarks/peers/requirements-fastdup.txt
    V/bin/python benchmarks/peers/fastdup_driver.py VECTORS.npy KEPT.npy EPS

fastdup finds the nearest neighbours of each row and connects those that are near; of a connected component
one row is kept, which is how its documentation removes duplicates.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import numpy as np

os.environ["SENTRY_OPT_OUT"] = "1"
NEIGHBOURS = 5


def main(vectors: str, kept: str, eps: float) -> None:
    import fastdup
    import pandas as pd

    x = np.load(vectors)
    with tempfile.TemporaryDirectory() as folder:
        fastdup.save_binary_feature(folder, [f"{i}.jpg" for i in range(len(x))], x)
        code = fastdup.run(
            input_dir=str(Path(folder) / "atrain_features.dat.csv"), work_dir=folder, run_mode=2, d=x.shape[1],
            threshold=1 - eps, nearest_neighbors_k=NEIGHBOURS, turi_param=f"ccthreshold={1 - eps}",
        )  # fmt: skip
        if code:
            sys.exit(f"fastdup ended with {code}")
        components = pd.read_csv(Path(folder) / "connected_components.csv")
    mask = np.ones(len(x), dtype=bool)
    mask[components["__id"][components["component_id"].duplicated()].to_numpy()] = False
    np.save(kept, mask)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
