"""Tests of examples/datasets.py."""

import gzip
import io
import json
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch


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
def test_higgs_reads_the_uci_layout_and_holds_out_the_last_rows(tmp_path, name, write):
    table = events(50)
    write(tmp_path / name, table)
    data = datasets.higgs(tmp_path / name)
    train, test = torch.from_numpy(table[:40]), torch.from_numpy(table[40:])
    torch.testing.assert_close(data.test_y, test[:, :1])
    torch.testing.assert_close(data.test_x, (test[:, 1:] - train[:, 1:].mean(0)) / train[:, 1:].std(0))


def test_higgs_refuses_other_tables_and_missing_paths(tmp_path):
    write_parquet(tmp_path / "x.parquet", events(10)[:, :5])
    with pytest.raises(ValueError, match="28 features, got 5 columns"):
        datasets.higgs(tmp_path / "x.parquet")
    with pytest.raises(FileNotFoundError, match="bundled higgs-sim sample"):
        datasets.higgs(tmp_path / "nothing")


def write_fashion(folder, shade, n=3):
    folder.mkdir()
    for name in datasets.FASHION_MD5:
        if "images" in name:
            body = bytes(16) + np.full((n, 28, 28), shade, np.uint8).tobytes()[:-1] + b"\0"
        else:
            body = bytes(8) + bytes([9, 0, shade % 10] * n)[:n]
        (folder / name).write_bytes(gzip.compress(body))
    return folder


def test_fashion_mnist_takes_the_path_then_the_cache_then_debian(tmp_path, monkeypatch):
    given, cache, debian = (write_fashion(tmp_path / name, i) for i, name in enumerate("abc", start=1))
    monkeypatch.setattr(datasets, "CACHE", cache)
    monkeypatch.setattr(datasets, "DEBIAN", debian)
    monkeypatch.setattr(datasets, "_download", None)
    assert datasets.fashion_mnist(given).train_y.tolist() == [9, 0, 1]
    assert datasets.fashion_mnist().train_y.tolist() == [9, 0, 2]
    os.remove(next(cache.iterdir()))
    data = datasets.fashion_mnist()
    assert data.train_y.tolist() == [9, 0, 3]
    assert data.train_x.shape == (3, 1, 28, 28)
    assert abs(data.train_x.mean()) < 1e-5


@pytest.mark.parametrize("answer", ["refused", "wrong content"])
def test_fashion_mnist_names_all_four_sources_when_none_works(tmp_path, monkeypatch, answer):
    def refuse(url, timeout):
        raise OSError("no route")

    monkeypatch.setattr(datasets, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets, "DEBIAN", tmp_path / "debian")
    answers = {"refused": refuse, "wrong content": lambda url, timeout: io.BytesIO(b"something else")}
    monkeypatch.setattr(datasets.urllib.request, "urlopen", answers[answer])
    with pytest.raises(FileNotFoundError) as error:
        datasets.fashion_mnist()
    for source in ("`path`", str(tmp_path / "cache"), "dataset-fashion-mnist", datasets.DOWNLOAD):
        assert source in str(error.value)
    assert not list((tmp_path / "cache").iterdir())


def test_fashion_mnist_refuses_a_path_without_the_files_and_does_not_look_elsewhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="lacks some of"):
        datasets.fashion_mnist(tmp_path)


def test_digits_split_is_the_same_every_time():
    first, second = datasets.digits(), datasets.digits()
    assert first.train_x.shape == (1000, 64)
    assert len(first.test_x) == 797
    assert torch.equal(first.train_x, second.train_x)
    assert torch.equal(first.test_y, second.test_y)
