"""What README and the documentation show must run as it stands."""

import re
import socket
from dataclasses import fields
from pathlib import Path

import pytest
import torch.distributed as dist

from apoptorch import Policy
from apoptorch.policy import POLICIES
from benchmarks import tables
from benchmarks.core import records

ROOT = Path(__file__).parents[1]
README = re.sub(r"<!--.*?-->", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
PAGES = [
    pytest.param(blocks, id=page.name)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if (blocks := re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.fixture
def one_rank(monkeypatch):
    """What torchrun would tell a run of one rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("blocks", PAGES)
@pytest.mark.usefixtures("one_rank")
def test_the_python_blocks_of_a_page_run_in_their_order(blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks:
        exec(compile(code, "documentation", "exec"), names)


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
