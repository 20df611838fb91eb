"""What README and the documentation show must run as it stands."""

import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from apoptorch import Policy
from apoptorch.policy import POLICIES
from benchmarks import tables
from benchmarks.core import records

ROOT = Path(__file__).parents[1]
README = re.sub(r"<!--.*?-->", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
PAGES = [
    pytest.param(page.name, blocks, id=page.name)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if (blocks := re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.fixture
def one_rank(monkeypatch):
    """What torchrun would tell a run of one rank."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0, "RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


OUTCOMES = {  # what the blocks of a page must have come to, given the names that they leave
    "README.md": lambda names: names["apoptosis"].state_dict()["step"] == len(names["loader"]) == 100,
    "quickstart.md": lambda names: (
        "<svg" in Path("report.html").read_text()
        and (names["event"].measured is None) == (not names["event"].changes)
        and torch.equal(names["plain"](names["inputs"]), names["small"](names["inputs"]))
    ),
    "distributed.md": lambda names: names["apoptosis"].state_dict()["step"] == 60 and names["epoch"] == 1,
    "policies.md": lambda names: (names["late"].stop, names["bold"].price) == (0.8, POLICIES["aggressive"].price),
    "troubleshooting.md": lambda names: (
        names["loss_fn"](torch.eye(3), torch.arange(3))
        < names["loss_fn"](SimpleNamespace(logits=torch.eye(3), aux_logits=torch.eye(3)), torch.arange(3))
    ),
    "trainers.md": lambda names: names["model"](torch.zeros(3, 20)).shape == (3, 2),
}


@pytest.mark.parametrize(("page", "blocks"), PAGES)
@pytest.mark.usefixtures("one_rank")
def test_the_python_blocks_of_a_page_run_in_their_order(page, blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks:
        exec(compile(code, "documentation", "exec"), names)
    assert OUTCOMES[page](names)


def test_documentation_links_lead_somewhere():
    for page in (ROOT / "docs").glob("*.md"):
        for path in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / path).exists(), (page.name, path)


def test_named_files_and_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`|    )make ([\w-]+)", README)) <= set(targets)
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README) + re.findall(r"`((?:data|examples)/[^`]+)`", README):
        assert (ROOT / path).exists(), path


def test_the_page_on_policies_has_every_field_with_its_values():
    page = (ROOT / "docs" / "policies.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", page, re.MULTILINE)
    values = [(f.name, *(repr(getattr(policy, f.name)) for policy in POLICIES.values())) for f in fields(Policy)]
    assert rows == values


def test_the_table_in_the_readme_is_what_was_measured():
    text = (ROOT / "README.md").read_text()
    assert tables.with_table(text, records()) == text
    assert tables.with_table(text, []) != text
