"""The real data that the examples and benchmarks train on, as standardised float32 tensors."""

import gzip
import hashlib
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

HIGGS_SAMPLE = Path(__file__).parents[1] / "data" / "higgs-sim-sample"
HIGGS_TEST_EVENTS = 500_000  # the last rows of the UCI file, as in Baldi, Sadowski, Whiteson 2014
CACHE = Path.home() / ".cache" / "apoptorch" / "fashion-mnist"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
DOWNLOAD = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MD5 = {  # as published with the data set
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}


class Split(NamedTuple):
    """Training and test data: features [n, ...] float32, targets [n, 1] float32 or [n] int64."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def higgs(path: str | Path | None = None) -> Split:
    """Collision events, 28 features [n, 28] standardised with the training statistics, labels [n, 1].

    path: None for the bundled higgs-sim sample; a directory with train.parquet and test.parquet; or the UCI
    file HIGGS.csv.gz (also as .csv or .parquet), label first, whose last 500,000 events are the test set.
    """
    path = HIGGS_SAMPLE if path is None else Path(path).expanduser()
    if path.is_dir() and (path / "train.parquet").exists() and (path / "test.parquet").exists():
        train, test = (_table(path / f"{split}.parquet") for split in ("train", "test"))
    elif path.is_file():
        events = _table(path)
        held_out = min(HIGGS_TEST_EVENTS, len(events) // 5)
        train, test = events[:-held_out], events[-held_out:]
    else:
        raise FileNotFoundError(
            f"`path` must be a directory with train.parquet and test.parquet or the UCI file HIGGS.csv.gz, "
            f"got {path}. Leave it out for the bundled higgs-sim sample."
        )
    mean, std = train[:, 1:].mean(0), train[:, 1:].std(0)
    return Split((train[:, 1:] - mean) / std, train[:, :1], (test[:, 1:] - mean) / std, test[:, :1])


def fashion_mnist(path: str | Path | None = None) -> Split:
    """60,000 + 10,000 images [n, 1, 28, 28] of clothes, standardised, and labels [n] in 0..9.

    path: a directory with the four .gz files; None looks in ~/.cache/apoptorch/fashion-mnist, then in
    Debian's package dataset-fashion-mnist, then downloads them into the cache and verifies their checksums.
    """
    folder = _fashion_folder(path)
    files = [np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8) for name in FASHION_MD5]
    train_x, test_x = (_images(files[i]) for i in (0, 2))
    train_y, test_y = (torch.from_numpy(files[i][8:].astype(np.int64)) for i in (1, 3))
    mean, std = train_x.mean(), train_x.std()
    return Split((train_x - mean) / std, train_y, (test_x - mean) / std, test_y)


def digits() -> Split:
    """scikit-learn's 1,797 digits: features [n, 64], labels [n]; 1,000 to train on, chosen with seed 0."""
    from sklearn.datasets import load_digits

    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y, train = x[order].float(), y[order].long(), slice(0, 1000)
    x = (x - x[train].mean()) / x[train].std()
    return Split(x[train], y[train], x[1000:], y[1000:])


def _table(path: Path) -> Tensor:
    """Columns of a parquet or CSV file as [rows, 29] float32, in file order."""
    from pyarrow import csv, parquet

    if path.suffix == ".parquet":
        table = parquet.read_table(path)
    else:
        table = csv.read_csv(path, csv.ReadOptions(autogenerate_column_names=True))
    if table.num_columns != 29:
        raise ValueError(
            f"`path` must hold the label and 28 features, got {table.num_columns} columns ({path}). "
            "Keep the columns of UCI HIGGS, label first."
        )
    columns = [torch.from_numpy(column.to_numpy().astype(np.float32)) for column in table.columns]
    return torch.stack(columns, dim=1)


def _images(idx: np.ndarray) -> Tensor:
    return torch.from_numpy(idx[16:].astype(np.float32)).reshape(-1, 1, 28, 28)


def _fashion_folder(path: str | Path | None) -> Path:
    candidates = (CACHE, DEBIAN) if path is None else (Path(path).expanduser(),)
    for folder in candidates:
        if all((folder / name).is_file() for name in FASHION_MD5):
            return folder
    try:
        if path is None:
            return _download(CACHE)
        problem = f"got {path}, which lacks some of {', '.join(FASHION_MD5)}"
    except OSError as error:
        problem = f"found none of them (the download failed: {error})"
    raise FileNotFoundError(
        "Fashion-MNIST must be in a directory passed as `path`, in the cache "
        f"{CACHE}, in Debian's package dataset-fashion-mnist ({DEBIAN}) or at {DOWNLOAD}; {problem}. "
        f"Put the four .gz files into the cache, or `apt-get install dataset-fashion-mnist`."
    )


def _download(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, md5 in FASHION_MD5.items():
        with urllib.request.urlopen(DOWNLOAD + name, timeout=60) as response:
            content = response.read()
        if hashlib.md5(content).hexdigest() != md5:
            raise OSError(f"the checksum of {name} is wrong")
        (folder / name).write_bytes(content)
    return folder
