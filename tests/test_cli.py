"""The command line as a user meets it: tables, JSON, exit codes, and no traceback for a mistake."""

import json
import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import apoptorch
from apoptorch.cli import app

NETS = """
    import torch
    from torch import nn

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        with torch.no_grad():
            for parameter in model[0].parameters():
                parameter[32:] = parameter[:32]
        return model

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.hidden, self.out = nn.Embedding(9, 8), nn.Linear(8, 16), nn.Linear(16, 2)

        def forward(self, input_ids):
            return self.out(self.hidden(self.embed(input_ids)).relu())

    def batches():
        generator = torch.Generator().manual_seed(1)
        return [(torch.randn(64, 20, generator=generator), torch.randint(4, (64,))) for _ in range(6)]

    def endless():
        while True:
            yield from batches()

    def breaking():
        yield from batches()[:2]
        raise OSError("no such disk")

    def broken():
        return 1 / 0

    def leaves():
        raise SystemExit(3)

    number = 5
"""


@pytest.fixture(autouse=True)
def nets(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(textwrap.dedent(NETS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_nets", None)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def answer(*arguments, code=0):
    return json.loads(run(*arguments, "--json", code=code).stdout)


def test_inspect_lists_the_groups_with_their_shares():
    found = answer("inspect", "my_nets:build", "--input", "2x20")
    assert found["parameters"] == 20 * 64 + 64 + 64 * 64 + 64 + 64 * 4 + 4
    first, _, last = found["groups"]
    assert (first["name"], first["neuron"], first["width"], first["prunable"]) == ("0", "relu", 64, True)
    assert first["parameter_share"] == pytest.approx((20 * 64 + 64 + 64 * 64) / found["parameters"])
    assert first["flops_share"] == pytest.approx((20 * 64 + 64 * 64) / (20 * 64 + 64 * 64 + 64 * 4))
    assert found["flops"] == 2 * 2 * (20 * 64 + 64 * 64 + 64 * 4)
    assert not last["prunable"]
    assert last["reason"]


def test_inspect_prints_a_table_with_the_reasons():
    shown = run("inspect", "my_nets.py:build", "--input", "1x20").stdout
    assert "neuron" in shown
    assert "no: " in shown
    assert "2 of 3 groups can shrink" in shown


@pytest.mark.parametrize("shape", ["2x5:int64", "input_ids=2x5:int64"])
def test_inputs_have_types_and_keywords(shape):
    groups = answer("inspect", "my_nets:Words", "--input", shape)["groups"]
    assert "hidden" in [group["name"] for group in groups]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["my_nets:build", "--input", "1x21"], "(1, 21)"),
        (["my_nets:build", "--input", "1x"], "`--input` must be like 1x3x224x224"),
        (["my_nets:build", "--input", "1x20:text"], "float32"),
        (["my_nets:build", "--input", "a=1x20", "--input", "1x20"], "keyword"),
        (["my_nets:nothing", "--input", "1x20"], "It has torch, nn, build"),
        (["my_nets:broken", "--input", "1x20"], "ZeroDivisionError: division by zero"),
        (["my_nets:leaves", "--input", "1x20"], "SystemExit: 3"),
        (["my_nets:build", "--input", "99999999999999x20"], "fit into memory"),
        (["my_nets:number", "--input", "1x20"], "torch.nn.Module, got int"),
        (["my_nets", "--input", "1x20"], "package.module:name"),
        (["not_there:build", "--input", "1x20"], "No module named 'not_there'"),
        (["not_there.py:build", "--input", "1x20"], "not_there.py"),
        (["my_nets:build", "--input", "1x20", "--weights", "none.safetensors"], "none.safetensors"),
        (["my_nets:build", "--input", "1x20", "--weights", "."], "directory that `save` wrote"),
    ],
)
def test_a_mistake_is_told_in_words_on_both_streams(arguments, words):
    result = run("inspect", *arguments, "--json", code=1)
    assert words in json.loads(result.stdout)["error"]
    assert "error: " in result.stderr
    assert "Traceback" not in result.output


def test_a_wrong_command_line_is_exit_code_2():
    assert "Missing argument" in run("inspect", code=2).stderr
    assert "No such command" in run("prune", code=2).stderr


def test_help_names_every_command_and_the_exit_codes():
    shown = run("--help").stdout
    for word in ("inspect", "shrink", "report", "demo", "doctor", "Exit codes"):
        assert word in shown


def test_shrink_by_weights_alone_writes_what_load_reads(nets):
    found = answer("shrink", "my_nets:build", "--input", "4x20", "--out", "small")
    assert found["event"]["widths_after"]["0"] == 32
    layers = json.loads((nets / "small" / "architecture.json").read_text())["layers"]
    assert layers["0"]["settings"]["out_features"] == 32
    import my_nets

    model, full = my_nets.build(), my_nets.build()
    apoptorch.load(model, "small")
    x = torch.randn(50, 20)
    torch.testing.assert_close(model(x), full(x))


def test_shrink_by_data_stays_within_the_loss_that_is_allowed(nets):
    import my_nets

    save_file(my_nets.build().state_dict(), "weights.safetensors")
    loss = ["--data", "my_nets:batches", "--loss", "torch.nn.functional:cross_entropy"]
    arguments = ["my_nets:build", "--input", "1x20", "--weights", "weights.safetensors", *loss]
    found = answer("shrink", *arguments, "--max-loss-increase", "0.01")["event"]
    assert found["measured"] <= 0.01
    assert found["parameters_after"] < found["parameters_before"]
    assert "of predictions change" in run("shrink", *arguments, "--max-loss-increase", "0.01").stdout


def test_data_is_read_as_far_as_needed_and_what_goes_wrong_is_told():
    arguments = ["my_nets:build", "--input", "1x20", "--loss", "torch.nn.functional:cross_entropy"]
    found = answer("shrink", *arguments, "--max-loss-increase", "0.01", "--data", "my_nets:endless")["event"]
    assert found["measured"] <= 0.01
    error = answer("shrink", *arguments, "--data", "my_nets:breaking", code=1)["error"]
    assert "`--data` must be importable and run, got OSError: no such disk" in error


def test_shrink_says_what_goes_together():
    error = answer("shrink", "my_nets:build", "--input", "1x20", "--max-loss-increase", "1", code=1)["error"]
    assert "`--data` must be given" in error


def test_demo_and_report(nets):
    found = answer("demo", "--width", "64", "--steps", "60", "--out", "run")
    assert found["dense"]["parameters"] == 20 * 64 + 64 + 2 * (64 * 64 + 64) + 64 * 4 + 4
    assert {"seconds", "parameters", "accuracy"} == set(found["apoptosis"])
    (nets / "run" / "report.html").unlink()
    told = answer("report", "run/history.json")
    assert told["report"] == "run/report.html"
    assert "<svg" in (nets / "run" / "report.html").read_text()
    (nets / "bad.json").write_text('{"events": [{"step": 1}]}')
    assert "history.json" in answer("report", "bad.json", code=1)["error"]
    history = json.loads((nets / "run" / "history.json").read_text())
    for key, wrong in (("curves", {"loss": [[math.inf, 1]]}), ("architecture", {"layers": 3}), ("total_steps", "many")):
        (nets / "bad.json").write_text(json.dumps(history | {key: wrong}))
        assert "`history` must be" in answer("report", "bad.json", code=1)["error"]


def test_the_real_command_ends_with_its_exit_code_and_no_traceback(nets):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([p for p in sys.path if p])}
    command = [sys.executable, "-c", "from apoptorch.cli import main; main()"]
    result = subprocess.run(
        [*command, "inspect", "my_nets:broken", "--input", "1x20"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert "error: `MODEL`" in result.stderr  # after what torch may have to say of its installation
    assert "Traceback" not in result.stderr


def test_doctor_tries_every_part_and_fails_when_one_fails(monkeypatch):
    found = answer("doctor")
    assert found["healthy"]
    assert [check["passed"] for check in found["checks"]] == [True, True, True]
    assert found["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    from apoptorch import doctor

    monkeypatch.setattr(doctor, "load", lambda model, path: None)
    monkeypatch.setattr(doctor, "_all_reduce", lambda: "left out")
    found = answer("doctor", code=1)
    assert not found["healthy"]
    assert "not what was saved" in found["checks"][1]["found"]
