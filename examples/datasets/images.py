"""Image classification, standardised with the training images' statistics."""

import gzip
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .arrays import stored
from .progress import progress
from .sources import Source
from .split import Split

FASHION_MNIST = Source(
    "Fashion-MNIST",
    "fashion-mnist",
    {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    debian="dataset-fashion-mnist",
)
MNIST = Source(
    "MNIST",
    "mnist",
    {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)
CIFAR10 = Source(  # the binary version: the other one is a pickle, which could run code
    "CIFAR-10",
    "cifar-10",
    {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
    "https://www.cs.toronto.edu/~kriz/",
)
CIFAR_RECORD = 1 + 3 * 32 * 32  # label, then red, green and blue planes


def fashion_mnist(path: str | Path | None = None) -> Split:
    """60,000 + 10,000 images [n, 1, 28, 28] of clothes, and labels [n] in 0..9.

    path: a directory with the four .gz files; None looks in ~/.cache/apoptorch/fashion-mnist, then in Debian's
    package dataset-fashion-mnist, then downloads them into the cache and verifies their checksums.

    Raises:
        FileNotFoundError: there are no such files.
        ValueError: they are of another format.
    """
    return _idx_split(FASHION_MNIST, path)


def mnist(path: str | Path | None = None) -> Split:
    """60,000 + 10,000 images [n, 1, 28, 28] of handwritten digits, and labels [n] in 0..9; as `fashion_mnist`."""
    return _idx_split(MNIST, path)


def cifar10(path: str | Path | None = None) -> Split:
    """50,000 + 10,000 images [n, 3, 32, 32] of ten classes of things, and labels [n].

    path: a directory with the official cifar-10-binary.tar.gz; None looks in ~/.cache/apoptorch/cifar-10, then
    downloads it into the cache and verifies its checksum.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another format.
    """
    archive = CIFAR10.directory(path) / "cifar-10-binary.tar.gz"
    with tarfile.open(archive) as tar:
        parts = {
            Path(m.name).name: tar.extractfile(m)
            for m in tar.getmembers()
            if m.name.endswith("_batch.bin") or "data_batch" in m.name
        }
        raw = {name: np.frombuffer(file.read(), np.uint8) for name, file in parts.items() if file is not None}
    train = [raw[name] for name in sorted(raw) if name.startswith("data_batch")]
    if "test_batch.bin" not in raw or not train or any(part.size % CIFAR_RECORD for part in raw.values()):
        raise ValueError(
            f"`path` must hold CIFAR-10's data_batch_*.bin and test_batch.bin, got {sorted(raw)} ({archive})."
        )
    records = [part.reshape(-1, CIFAR_RECORD) for part in (np.concatenate(train), raw["test_batch.bin"])]
    (train_x, train_y), (test_x, test_y) = (
        (
            torch.from_numpy(r[:, 1:].astype(np.float32)).reshape(-1, 3, 32, 32),
            torch.from_numpy(r[:, 0].astype(np.int64)),
        )
        for r in records
    )
    return _standardised(train_x, train_y, test_x, test_y)


def image_folder(path: str | Path, size: int = 224, classes: int | None = None) -> Split:
    """ImageNet's layout: path/train/CLASS/*.jpg and path/val/CLASS/*.jpg -> images [n, 3, size, size], labels [n].

    Images are scaled to `size` along their shorter side and cropped at the centre. They are decoded once, into a file
    in the cache, standardised with ImageNet's published mean and standard deviation (4 x 3 x size^2 bytes an image),
    and read from there, so that memory stays bounded. Classes are numbered in the order of their names in train.

    classes: only the first so many; None for all.

    Raises:
        FileNotFoundError: there is no path/train or path/val, or no image in one of them.
        ValueError: val has a class that train lacks.
    """
    root = Path(path).expanduser()
    names = sorted(folder.name for folder in (root / "train").glob("*/"))[:classes]
    strangers = {folder.name for folder in (root / "val").glob("*/")} - {f.name for f in (root / "train").glob("*/")}
    if strangers:
        raise ValueError(f"`path`/val must have the classes of train, got {sorted(strangers)[:5]} too ({root}).")
    parts = []
    for split in ("train", "val"):
        files = [
            (file, i)
            for i, name in enumerate(names)
            for file in sorted((root / split / name).glob("*"))
            if file.suffix.lower() in _IMAGES
        ]
        if not files:
            raise FileNotFoundError(
                f"`path` must hold {split}/CLASS/*.jpg, got no image ({root / split}). "
                "Unpack the data set into class folders."
            )
        pixels = stored(_decoded(files, size, split), (3, size, size), [root.resolve(), split, size, names, len(files)])
        parts += [pixels, torch.tensor([label for _, label in files])]
    return Split(*parts)


def digits() -> Split:
    """scikit-learn's 1,797 digits: features [n, 64], labels [n]; 1,000 to train on, chosen with seed 0."""
    from sklearn.datasets import load_digits

    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y, train = x[order].float(), y[order].long(), slice(0, 1000)
    x = (x - x[train].mean()) / x[train].std()
    return Split(x[train], y[train], x[1000:], y[1000:])


_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_MEAN, _STD = (np.array(v, np.float32).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def _decoded(files: list[tuple[Path, int]], size: int, split: str) -> Iterator[np.ndarray]:
    from PIL import Image, ImageOps

    with progress(f"decoding {split}", len(files)) as advance:
        for file, _ in files:
            with Image.open(file) as image:
                fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
            pixels = np.asarray(fitted, np.float32).transpose(2, 0, 1) / 255
            yield ((pixels - _MEAN) / _STD)[None]
            advance(1)


def _idx_split(source: Source, path: str | Path | None) -> Split:
    folder = source.directory(path)
    train_x, train_y, test_x, test_y = (_idx(folder / name) for name in source.files)
    images = (torch.from_numpy(part.astype(np.float32))[:, None] for part in (train_x, test_x))
    labels = (torch.from_numpy(part.astype(np.int64)) for part in (train_y, test_y))
    (train, test), (train_labels, test_labels) = images, labels
    mean, std = train.mean(), train.std()
    return Split((train - mean) / std, train_labels, (test - mean) / std, test_labels)


def _idx(file: Path) -> np.ndarray:
    """An IDX file of bytes: two zeros, the type 8, the number of dimensions, each of them big-endian, the data."""
    content = gzip.decompress(file.read_bytes())
    dims = content[3] if len(content) > 3 else 0
    shape = np.frombuffer(content[4 : 4 + 4 * dims], ">u4") if len(content) >= 4 + 4 * dims else np.zeros(0)
    if content[:3] != b"\0\0\x08" or len(content) != 4 + 4 * dims + int(np.prod(shape)):
        raise ValueError(f"`path` must hold IDX files of bytes, got something else ({file}). Download it again.")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape.astype(int))


def _standardised(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> Split:
    """Channel by channel, with the training images' statistics."""
    mean, std = train_x.mean((0, 2, 3), keepdim=True), train_x.std((0, 2, 3), keepdim=True)
    return Split((train_x - mean) / std, train_y, (test_x - mean) / std, test_y)
