"""Tests of examples/datasets."""

import dataclasses
import gzip
import hashlib
import importlib
import io
import json
import os
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import images, sources
from PIL import Image

HIGGS = importlib.import_module("datasets.higgs")  # the package's `higgs` is the function
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def test_bundled_higgs_sample_is_large_enough_standardised_and_small_on_disk():
    data = datasets.higgs()
    assert data.train_x.shape[0] >= 60_000
    assert data.train_x.shape[1] == data.test_x.shape[1] == 28
    assert data.train_y.shape == (len(data.train_x), 1)
    torch.testing.assert_close(data.train_x.mean(0), torch.zeros(28), atol=1e-4, rtol=0)
    torch.testing.assert_close(data.train_x.std(0), torch.ones(28), atol=1e-4, rtol=0)
    assert set(data.test_y.unique().tolist()) == {0.0, 1.0}
    assert sum(f.stat().st_size for f in datasets.HIGGS_SAMPLE.iterdir()) <= 6e6
    normalisation = json.loads((datasets.HIGGS_SAMPLE / "normalisation.json").read_text())
    assert pq.read_schema(datasets.HIGGS_SAMPLE / "train.parquet").names == ["label", *normalisation]


def events(n):
    table = np.random.default_rng(0).normal(5, 3, (n, 29)).astype(np.float32)
    table[:, 0] = np.arange(n) % 2
    return table


def write_csv_gz(path, table):
    with gzip.open(path, "wt") as file:
        np.savetxt(file, table, delimiter=",", fmt="%.8e")


def write_parquet(path, table):
    pq.write_table(pa.table({str(i): table[:, i] for i in range(table.shape[1])}), path)


@pytest.mark.parametrize(("name", "write"), [("HIGGS.csv.gz", write_csv_gz), ("HIGGS.parquet", write_parquet)])
def test_higgs_reads_the_uci_layout_once_in_pieces_and_holds_out_the_last_rows(
    tmp_path, cache, monkeypatch, name, write
):
    monkeypatch.setattr(HIGGS, "CHUNK", 7)
    table = events(50)
    write(tmp_path / name, table)
    train, test = torch.from_numpy(table[:40]), torch.from_numpy(table[40:])
    for _ in range(2):
        data = datasets.higgs(tmp_path / name)
        torch.testing.assert_close(data.test_y, test[:, :1])
        torch.testing.assert_close(data.test_x, (test[:, 1:] - train[:, 1:].mean(0)) / train[:, 1:].std(0))
        monkeypatch.setattr(HIGGS, "_pieces", lambda path: iter(()))
    assert [file.suffix for file in (cache / "arrays").iterdir()] == [".f32"]


def test_higgs_refuses_other_tables_and_missing_paths(tmp_path, cache):
    write_parquet(tmp_path / "x.parquet", events(10)[:, :5])
    with pytest.raises(ValueError, match="28 features, got 5 columns"):
        datasets.higgs(tmp_path / "x.parquet")
    write_parquet(tmp_path / "x.parquet", events(10) + 1)
    with pytest.raises(ValueError, match="labels 0 and 1"):
        datasets.higgs(tmp_path / "x.parquet")
    assert not list((cache / "arrays").glob("*.f32"))
    with pytest.raises(FileNotFoundError, match="bundled higgs-sim sample"):
        datasets.higgs(tmp_path / "nothing")


def idx(array):
    """Bytes in the IDX format."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(header + array.astype(np.uint8).tobytes())


def write_idx(folder, source, shade, n=3):
    folder.mkdir(parents=True)
    images = np.full((n, 28, 28), shade)
    images[-1, -1, -1] = 0
    for name in source.files:
        (folder / name).write_bytes(idx(images if "images" in name else np.resize([9, 0, shade % 10], n)))
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_fashion_mnist_takes_the_path_then_the_cache_then_debian(tmp_path, cache, monkeypatch):
    source = images.FASHION_MNIST
    given, cached, debian = (write_idx(tmp_path / name, source, i) for i, name in enumerate("abc", start=1))
    monkeypatch.setattr(sources.Source, "_folders", lambda self: [cached, debian])
    monkeypatch.setattr(sources.Source, "_download", None)
    assert datasets.fashion_mnist(given).train_y.tolist() == [9, 0, 1]
    assert datasets.fashion_mnist().train_y.tolist() == [9, 0, 2]
    os.remove(next(cached.iterdir()))
    data = datasets.fashion_mnist()
    assert data.train_y.tolist() == [9, 0, 3]
    assert data.train_x.shape == (3, 1, 28, 28)
    assert abs(data.train_x.mean()) < 1e-5


@pytest.mark.parametrize("answer", ["refused", "wrong content"])
def test_fashion_mnist_names_all_four_sources_when_none_works(cache, monkeypatch, answer):
    def refuse(url, timeout):
        raise OSError("no route")

    monkeypatch.setattr(sources.Source, "_folders", lambda self: [cache / self.folder])
    answers = {"refused": refuse, "wrong content": lambda url, timeout: io.BytesIO(b"something else")}
    monkeypatch.setattr(sources.urllib.request, "urlopen", answers[answer])
    with pytest.raises(FileNotFoundError) as error:
        datasets.fashion_mnist()
    for source in ("`path`", str(cache), "dataset-fashion-mnist", images.FASHION_MNIST.url):
        assert source in str(error.value)
    assert not list((cache / "fashion-mnist").iterdir())


def test_mnist_is_downloaded_once_and_verified(tmp_path, cache, monkeypatch):
    contents = {file.name: file.read_bytes() for file in write_idx(tmp_path / "web", images.MNIST, 7).iterdir()}
    sums = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    source = dataclasses.replace(images.MNIST, files={name: sums[name] for name in images.MNIST.files})
    monkeypatch.setattr(images, "MNIST", source)
    asked = []

    def answer(url, timeout):
        asked.append(url)
        return io.BytesIO(contents[url.rsplit("/", 1)[1]])

    monkeypatch.setattr(sources.urllib.request, "urlopen", answer)
    assert datasets.mnist().test_y.tolist() == datasets.mnist().test_y.tolist() == [9, 0, 7]
    assert len(asked) == 4


def test_image_sets_refuse_a_path_without_the_files_or_with_others(tmp_path):
    for load in (datasets.fashion_mnist, datasets.mnist, datasets.cifar10):
        with pytest.raises(FileNotFoundError, match="lacks some of"):
            load(tmp_path)
    folder = write_idx(tmp_path / "cut", images.MNIST, 5)
    file = folder / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-1]))
    with pytest.raises(ValueError, match="IDX"):
        datasets.mnist(folder)


def test_cifar10_reads_labels_and_planes_and_standardises_channels(tmp_path):
    records = np.random.default_rng(0).integers(0, 256, (6, images.CIFAR_RECORD)).astype(np.uint8)
    records[:, 0] = [3, 1, 4, 1, 5, 9]
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for name, part in (("data_batch_2", records[2:4]), ("data_batch_1", records[:2]), ("test_batch", records[4:])):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            info.size = part.size
            tar.addfile(info, io.BytesIO(part.tobytes()))
    data = datasets.cifar10(tmp_path)
    assert data.train_y.tolist() == [3, 1, 4, 1]
    assert data.test_y.tolist() == [5, 9]
    green = torch.from_numpy(records[:4, 1025:2049].astype(np.float32))
    expected = (float(records[5, 1024 + 1 + 33]) - green.mean()) / green.std()
    torch.testing.assert_close(data.test_x[1, 1, 1, 1], expected)


def test_image_folder_decodes_once_crops_and_numbers_classes_by_name(tmp_path, cache):
    colours = {"ant": (255, 0, 0), "bee": (0, 255, 0)}
    for split, n in (("train", 2), ("val", 1)):
        for name, colour in colours.items():
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (40, 20 + i), colour).save(tmp_path / split / name / f"{i}.png")
    for _ in range(2):  # decoded, then from the cache
        data = datasets.image_folder(tmp_path, size=8)
        assert data.train_x.shape == (4, 3, 8, 8)
        assert data.train_y.tolist() == [0, 0, 1, 1]
        assert data.test_y.tolist() == [0, 1]
        torch.testing.assert_close(data.test_x[1, :, 3, 3], (torch.tensor([0.0, 1, 0]) - MEAN) / STD)
    assert len(list((cache / "arrays").iterdir())) == 2
    (tmp_path / "val" / "cow").mkdir()
    with pytest.raises(ValueError, match="cow"):
        datasets.image_folder(tmp_path, size=8)
    with pytest.raises(FileNotFoundError, match="class folders"):
        datasets.image_folder(tmp_path / "train")


def test_text_blocks_predict_the_next_character_and_do_not_overlap(tmp_path):
    (tmp_path / "b.txt").write_text("".join(chr(97 + i % 26) for i in range(500)))
    (tmp_path / "a.py").write_text("\tdéf\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "c.py").write_text("x" * 1000)
    data = datasets.text(tmp_path, block=9)
    shown = ["".join(datasets.CHARACTERS[i] for i in row) for row in torch.cat([data.train_x, data.test_x])]
    assert shown[:2] == ["    d?f\n\n", "bcdefghij"]
    assert torch.equal(data.train_x[:, 1:], data.train_y[:, :-1])
    assert len(data.test_x) == (len(data.train_x) + len(data.test_x)) // 10
    assert "x" * 5 not in "".join(shown)
    few = datasets.text(tmp_path, block=9, characters=100)
    assert len(few.train_x) + len(few.test_x) == 10
    with pytest.raises(ValueError, match="at least"):
        datasets.text(tmp_path, block=500)
    with pytest.raises(FileNotFoundError, match="standard library"):
        datasets.text(tmp_path / "nothing")


def test_the_standard_library_is_text_of_a_known_alphabet():
    data = datasets.text(block=64, characters=50_000)
    assert 600 < len(data.train_x) < 770
    assert int(data.train_x.max()) < len(datasets.CHARACTERS)
    assert len(data.train_x.unique()) > 60


def test_validation_holds_out_training_rows_only_and_the_same_ones_every_time():
    rows = torch.arange(200.0)[:, None]
    data = datasets.Split(rows[:100], rows[:100], rows[100:], rows[100:])
    first, second = datasets.validation(data), datasets.validation(data)
    assert len(first.test_x) == 10
    assert torch.cat([first.train_x, first.test_x]).sort(0).values.equal(data.train_x)
    assert first.test_x.equal(first.test_y)
    assert first.test_x.equal(second.test_x)


def test_digits_split_is_the_same_every_time():
    first, second = datasets.digits(), datasets.digits()
    assert first.train_x.shape == (1000, 64)
    assert len(first.test_x) == 797
    assert torch.equal(first.train_x, second.train_x)
    assert torch.equal(first.test_y, second.test_y)
