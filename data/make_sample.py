"""Draw the bundled higgs-sim sample from the full set: python data/make_sample.py FULL_SET_DIRECTORY"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SEED = 0
EVENTS = {"train": 100_000, "test": 20_000}
HERE = Path(__file__).parent / "higgs-sim-sample"


def draw(source: Path, events: int, seed: int) -> pa.Table:
    """`events` rows of the parquet file, without replacement, in file order, as float16."""
    full = pq.read_table(source)
    rows = np.sort(np.random.default_rng(seed).choice(len(full), events, replace=False))
    columns = {name: full[name].to_numpy()[rows].astype(np.float16) for name in full.column_names}
    for name, values in columns.items():
        if not np.isfinite(values).all():
            raise ValueError(f"column `{name}` must fit float16, got values beyond 65504. Rescale it first.")
    return pa.table(columns)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    for split, events in EVENTS.items():
        table = draw(source / f"{split}.parquet", events, SEED)
        pq.write_table(
            table,
            HERE / f"{split}.parquet",
            compression="zstd",
            compression_level=19,
            use_dictionary=[name for name in table.column_names if name == "label" or name.endswith("tag")],
            column_encoding={
                name: "BYTE_STREAM_SPLIT" for name in table.column_names if name != "label" and not name.endswith("tag")
            },
        )
        print(split, json.dumps({"events": events, "bytes": (HERE / f"{split}.parquet").stat().st_size}))
    shutil.copyfile(source / "normalisation.json", HERE / "normalisation.json")
