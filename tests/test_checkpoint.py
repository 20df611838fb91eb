"""Checkpoints: what comes back, what is refused, and that a refusal or a crash changes nothing."""

import copy
import json
import os
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from apoptorch import checkpoint, tensor_files
from apoptorch.checkpoint import load, save
from apoptorch.errors import CheckpointError
from apoptorch.plan import ChannelGroup, Consumer, Fold, FoldPlan, Slot
from apoptorch.surgery import Surgery, attributes


def build(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 16, 1, groups=8), nn.Flatten(),
        weight_norm(nn.Linear(16 * 4, 6)), nn.ReLU(), spectral_norm(nn.Linear(6, 3)),
    ).to(dtype)  # fmt: skip


def shrink(model, optimizers=()):
    path = "parametrizations.weight.original"
    norm = [Slot(f"1.{t}", 0) for t in ("weight", "bias", "running_mean", "running_var")]
    through = (*norm, Slot("2.weight", 0), Slot("3.weight", 0, 2), Slot("3.bias", 0, 2))
    made = (Slot("0.weight", 0), Slot("0.bias", 0))
    rows = (Slot(f"5.{path}0", 0), Slot(f"5.{path}1", 0), Slot("5.bias", 0))
    groups = [
        ChannelGroup("0", 8, 8, "general", made, through, (Consumer(Slot("5.weight", 1, 8), "5.bias"),)),
        ChannelGroup("5", 6, 6, "relu", rows, (), (Consumer(Slot("7.weight", 1), "7.bias"),)),
    ]
    with Surgery(model, optimizers) as surgery:
        for g, keep in zip(groups, ([0, 2, 5, 6, 7], [1, 3, 4]), strict=True):
            eye = torch.eye(g.width, dtype=torch.float64)[:, keep]
            surgery.fold_(g, FoldPlan(g.name, torch.tensor(keep), (Fold(eye),)))
    return model


def train(model, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 4, 4, generator=generator)).square().mean().backward()
        optimizer.step()


def everything(model):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return state, [attributes(m) for m in model.modules()], [id(p) for p in model.parameters()], str(model)


def assert_unchanged(model, before):
    after = everything(model)
    assert before[1:] == after[1:]
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), after[0].values(), strict=True))


class State:
    def state_dict(self):
        return {"step": 7, "widths": {"0": 5}, "history": [{"predicted": None}], "name": "é"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_was_saved_comes_back(tmp_path, dtype):
    model = shrink(build(dtype=dtype).to(memory_format=torch.channels_last))
    save(model, tmp_path / "a" / "b", State())
    fresh = build(seed=5, dtype=dtype).to(memory_format=torch.channels_last)
    parameters = list(fresh.parameters())
    assert load(fresh, str(tmp_path / "a" / "b")) == State().state_dict()
    assert str(fresh) == str(model)
    assert all(p is q for p, q in zip(fresh.parameters(), parameters, strict=True))
    for (name, a), b in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert a.dtype == b.dtype == (b.dtype if name.endswith("tracked") else dtype)
        assert torch.equal(a, b)
    assert fresh[0].weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 4, 4, dtype=dtype)
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    save(model, tmp_path / "plain")
    assert load(build(dtype=dtype), tmp_path / "plain") is None


def test_resumed_run_is_bitwise_equal(tmp_path):
    """The documented order: build, load, optimizer, optimizer.load_state_dict."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    train(model, optimizer, 3)
    shrink(model, [optimizer])
    train(model, optimizer, 2)
    save(model, tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    fresh = build(seed=9)
    load(fresh, tmp_path)
    resumed = torch.optim.AdamW(fresh.parameters(), 0.01)
    resumed.load_state_dict(state)
    train(model, optimizer, 4, seed=2)
    train(fresh, resumed, 4, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_tied_tensors_are_saved_once_and_stay_tied(tmp_path):
    def tied():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    save(model := tied(), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["tied"] == {"1.weight": "0.weight"}
    assert set(safetensors.torch.load_file(tmp_path / manifest["file"])) == {"0.weight", "0.bias", "1.bias"}
    load(fresh := tied(), tmp_path)
    assert fresh[1].weight is fresh[0].weight
    assert torch.equal(fresh[0].weight, model[0].weight)
    with pytest.raises(CheckpointError, match=r"tie of `1.weight` must be 0.weight.*got 1.weight"):
        load(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), tmp_path)


def test_views_of_one_storage_and_buffers_that_are_not_persistent_are_saved(tmp_path):
    def views():
        model, flat = nn.Linear(3, 2), torch.randn(8)
        model.weight.data, model.bias.data = flat[:6].view(2, 3), flat[6:]
        model.register_buffer("scale", torch.randn(2), persistent=False)
        return model

    save(model := views(), tmp_path)
    load(fresh := views(), tmp_path)
    assert torch.equal(fresh.weight, model.weight)
    assert torch.equal(fresh.scale, model.scale)


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    save(build(), tmp_path)
    save(model := shrink(build(seed=2)), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    load(fresh := build(), tmp_path)
    assert torch.equal(fresh[0].weight, model[0].weight)


@pytest.mark.parametrize("stage", ["tensor_files.save_file", "tensor_files.sync", "os.replace", "json.dumps"])
def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, stage, monkeypatch):
    save(old := build(seed=3), tmp_path)
    original = getattr(os if stage == "os.replace" else json if "json" in stage else tensor_files, stage.split(".")[-1])
    reached = 0
    for failing in range(10):
        calls = iter(range(100))

        def fail(*args, calls=calls, failing=failing, **options):
            if next(calls) == failing:
                raise OSError("no space left")
            return original(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(f"apoptorch.checkpoint.{stage}", fail)
            try:
                save(shrink(build()), tmp_path)
            except OSError:
                reached += 1
            else:
                break
        if stage != "tensor_files.sync" or failing < 2:  # the third sync is after the manifest was replaced
            load(fresh := build(), tmp_path)
            assert torch.equal(fresh[0].weight, old[0].weight)
    assert reached
    assert len(list(tmp_path.iterdir())) == 2


def edit(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def put(*keys):
    """A change of the manifest: put(key, ..., value)."""

    def change(manifest):
        for key in keys[:-2]:
            manifest = manifest[key]
        manifest[keys[-2]] = keys[-1]

    return change


EDITS = {
    "format": (put("format", "onnx"), "must be of format apoptorch"),
    "version": (put("version", 2), "Update apoptorch"),
    "escape": (put("file", "../secret.safetensors"), "`file` must be the name"),
    "absolute": (put("file", "/etc/passwd"), "`file` must be the name"),
    "file of another type": (put("file", 3), "`file` must be the name"),
    "missing file": (put("file", f"model-{'0' * 32}.safetensors"), "must be a safetensors file"),
    "tensors": (put("tensors", []), "`tensors` must be an object"),
    "tied": (put("tied", None), "`tied` must be an object"),
    "apoptosis": (put("apoptosis", 5), "`apoptosis` must be"),
    "negative": (put("tensors", "0.bias", "shape", [-1]), r"`shape` of `0.bias` .* got \[-1\]"),
    "boolean": (put("tensors", "0.bias", "shape", [True]), "`shape` of `0.bias`"),
    "fraction": (put("tensors", "0.bias", "shape", [5.0]), "`shape` of `0.bias`"),
    "entry": (put("tensors", "0.bias", None), "`shape` of `0.bias`"),
    "huge": (put("tensors", "0.bias", "shape", [10**12]), "1000000000000"),
    "other size": (put("tensors", "0.bias", "shape", [4]), r"must be \[4\], as the manifest says, got \[5\]"),
    "dtype": (put("tensors", "0.bias", "dtype", "float64"), "must be float64"),
    "no dtype": (put("tensors", "0.bias", "dtype", 0), "`dtype` of `0.bias`"),
    "unknown name": (put("tensors", "9.bias", {"shape": [1], "dtype": "float32"}), "`9.bias` must be"),
    "attributes": (put("attributes", "0", "out_channels", 6), "attributes of `0`"),
}


@pytest.mark.parametrize("case", EDITS)
def test_manifest_that_is_not_to_be_trusted(tmp_path, case):
    save(shrink(build()), tmp_path)
    (tmp_path.parent / "secret.safetensors").write_bytes(b"")
    edit(tmp_path, EDITS[case][0])
    model = build(seed=4)
    before = everything(model)
    with pytest.raises(CheckpointError, match=EDITS[case][1]):
        load(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "null", '"apoptorch"', "\x00\xff"])
def test_manifest_that_is_not_json(tmp_path, text):
    save(build(), tmp_path)
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"must be (JSON|of format)"):
        load(build(), tmp_path)


def test_no_checkpoint_and_a_file_in_its_place(tmp_path):
    with pytest.raises(CheckpointError, match="must be a directory that `save` wrote"):
        load(build(), tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="must be a directory"):
        save(build(), tmp_path / "file")
    with pytest.raises(CheckpointError, match="must be a directory"):
        load(build(), tmp_path / "file")


def test_manifest_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    save(build(), tmp_path)
    monkeypatch.setattr(checkpoint, "_MAX_BYTES", 100)
    with pytest.raises(CheckpointError, match="at most 100 bytes"):
        load(build(), tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "pickle", "empty", "other tensors"])
def test_tensors_that_are_damaged(tmp_path, damage):
    save(shrink(build()), tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    content = file.read_bytes()

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    if damage == "other tensors":
        safetensors.torch.save_file({"0.bias": torch.zeros(5)}, file)
    else:
        file.write_bytes({"truncated": content[:-8], "pickle": pickle.dumps(Payload()), "empty": b""}[damage])
    model = build(seed=4)
    before = everything(model)
    with pytest.raises(CheckpointError, match=r"must be a safetensors file|as the manifest says, got nothing"):
        load(model, tmp_path)
    assert_unchanged(model, before)
    assert not (tmp_path / "executed").exists()


def test_every_problem_of_a_model_that_does_not_fit_is_listed(tmp_path):
    save(shrink(build()), tmp_path)
    model = build(seed=4)
    model[0] = nn.Conv2d(3, 4, 3)  # narrower than what was saved
    model[1].double()
    model.add_module("new", nn.Linear(2, 2))
    before = everything(model)
    with pytest.raises(CheckpointError) as error:
        load(model, tmp_path)
    for part in ("problems, nothing was changed", "`0.weight` must be narrowed", "`1.weight` must be float32",
                 "`new.weight` must be nothing"):  # fmt: skip
        assert part in str(error.value)
    assert_unchanged(model, before)


def test_same_shapes_in_another_module_are_told_apart_by_attributes(tmp_path):
    save(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), tmp_path)
    with pytest.raises(CheckpointError, match=r"attributes of `0`.*'groups': 2"):
        load(nn.Sequential(nn.Conv2d(2, 4, 1)), tmp_path)


def test_failure_while_filling_puts_everything_back(tmp_path, monkeypatch):
    save(shrink(build()), tmp_path)
    model = build(seed=4)
    before, original, calls = everything(model), torch.empty_like, []

    def fail(*args, **options):
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError
        return original(*args, **options)

    monkeypatch.setattr(torch, "empty_like", fail)
    with pytest.raises(MemoryError):
        load(model, tmp_path)
    assert_unchanged(model, before)


def test_state_that_is_not_a_tensor_is_refused(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"epoch": 3}

    with pytest.raises(CheckpointError, match="`_extra_state` must be a tensor"):
        save(Extra(2, 2), tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
