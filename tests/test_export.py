"""A shrunk model leaves: torch.export, ONNX, and plain PyTorch from architecture.json and safetensors."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from trainers import POLICY, data, loss_fn, network

from apoptorch import Apoptosis
from apoptorch.architecture import architecture


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(24, 24, 3, stride=2), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(24 * 1 * 1, 3)

    def forward(self, x):
        return self.head(self.features(x))


def shrunk(kind):
    model, x = (network(), data(64)[0]) if kind == "linear" else (Convolutional(), torch.randn(64, 1, 7, 7))
    model.eval()
    event = Apoptosis(model, example_inputs=x, policy=POLICY).apoptose(x, budget=0.05)
    assert event.parameters_after < event.parameters_before
    return model, x


@pytest.mark.parametrize("kind", ["linear", "convolutional"])
def test_torch_export_computes_the_same(kind):
    model, x = shrunk(kind)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("kind", ["linear", "convolutional"])
@pytest.mark.filterwarnings("ignore")
def test_onnxruntime_computes_the_same(kind, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = shrunk(kind)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_architecture_and_weights_are_enough_to_build_the_network_without_apoptorch(tmp_path):
    model, x = shrunk("linear")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "architecture.json").write_text(json.dumps(architecture(model)))
    read = json.loads((tmp_path / "architecture.json").read_text())
    assert read["parameters"] == sum(p.numel() for p in model.parameters())
    layers = []
    for index in range(5):
        entry = read["layers"].get(str(index), {"type": "ReLU", "settings": {}})
        sizes = {key: entry["settings"][key] for key in ("in_features", "out_features") if key in entry["settings"]}
        layers.append(getattr(nn, entry["type"])(**sizes))
    rebuilt = nn.Sequential(*layers)
    rebuilt.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(rebuilt(x), model(x))
    assert loss_fn(rebuilt(x), data(64)[1]) == loss_fn(model(x), data(64)[1])
