"""Collision events: UCI HIGGS, or the simulated stand-in higgs-sim."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from .arrays import stored
from .progress import progress
from .split import Split

HIGGS_SAMPLE = Path(__file__).parents[2] / "data" / "higgs-sim-sample"
COLUMNS = ["label", *json.loads((HIGGS_SAMPLE / "normalisation.json").read_text())]
TEST_EVENTS = 500_000  # the last rows of the UCI file, as in Baldi, Sadowski, Whiteson 2014
CHUNK = 500_000  # rows at a time


def higgs(path: str | Path | None = None) -> Split:
    """Collision events, 28 features [n, 28] standardised with the training statistics, labels [n, 1].

    path: None for the bundled higgs-sim sample; a directory with train.parquet and test.parquet (higgs-sim); or the
    UCI file HIGGS.csv.gz (also as .csv or .parquet), label first, whose last 500,000 events are the test set. The UCI
    file is read once, piece by piece, into a file of the cache (1.3 GB for its 11 million events), and from there as
    it is indexed: memory stays bounded.

    Raises:
        FileNotFoundError: there is nothing of the kind.
        ValueError: the table has other columns, or labels other than 0 and 1.
    """
    path = HIGGS_SAMPLE if path is None else Path(path).expanduser()
    if path.is_dir() and (path / "train.parquet").exists() and (path / "test.parquet").exists():
        train, test = (
            torch.from_numpy(np.concatenate(list(_pieces(path / f"{s}.parquet")))) for s in ("train", "test")
        )
        mean, std = train[:, 1:].mean(0), train[:, 1:].std(0)
        for part in (train, test):
            part[:, 1:] = (part[:, 1:] - mean) / std
    elif path.is_file():
        about = path.stat()
        events = stored(_pieces(path), (len(COLUMNS),), [path.resolve(), about.st_size, about.st_mtime], _standardise)
        held_out = _held_out(len(events))
        train, test = events[:-held_out], events[-held_out:]
    else:
        raise FileNotFoundError(
            f"`path` must be a directory with train.parquet and test.parquet or the UCI file HIGGS.csv.gz, "
            f"got {path}. Leave it out for the bundled higgs-sim sample."
        )
    return Split(train[:, 1:], train[:, :1], test[:, 1:], test[:, :1])


def _held_out(events: int) -> int:
    return min(TEST_EVENTS, events // 5)


def _standardise(events: np.memmap) -> None:
    """All features in place, with the mean and standard deviation of the training rows, in float64."""
    train = events[: len(events) - _held_out(len(events)), 1:]
    chunks = [slice(i, i + CHUNK) for i in range(0, len(events), CHUNK)]
    mean = sum(train[chunk].sum(0, dtype=np.float64) for chunk in chunks) / len(train)
    square = sum(np.square(train[chunk] - mean, dtype=np.float64).sum(0) for chunk in chunks)
    std = np.sqrt(square / (len(train) - 1))
    for chunk in chunks:
        events[chunk, 1:] = (events[chunk, 1:] - mean) / std


def _pieces(path: Path) -> Iterator[np.ndarray]:
    """The table's rows in file order, [m, 29] at a time."""
    from pyarrow import csv, input_stream, parquet

    size = path.stat().st_size
    with progress(f"reading {path.name}", size) as advance, path.open("rb") as file:
        if path.suffix == ".parquet":
            batches = parquet.ParquetFile(file).iter_batches(batch_size=CHUNK)
        else:
            stream = input_stream(file, compression="gzip" if path.suffix == ".gz" else None)
            options = csv.ReadOptions(autogenerate_column_names=True, block_size=1 << 24)
            batches = csv.open_csv(stream, options)
        seen = 0
        for batch in batches:
            yield _checked(np.stack([np.asarray(column, np.float32) for column in batch.columns], 1), path)
            advance(min(size, file.tell()) - seen)
            seen = min(size, file.tell())


def _checked(rows: np.ndarray, path: Path) -> np.ndarray:
    if rows.shape[1] != len(COLUMNS):
        raise ValueError(
            f"`path` must hold the label and 28 features, got {rows.shape[1]} columns ({path}). "
            "Keep the columns of UCI HIGGS, label first."
        )
    if not np.isin(rows[:, 0], (0, 1)).all() or not np.isfinite(rows).all():
        raise ValueError(
            f"`path` must hold labels 0 and 1 and finite features, got others ({path}). Download it again."
        )
    return rows
