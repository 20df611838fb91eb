"""What README and the documentation show must run as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = re.sub(r"<!--.*?-->", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)


BLOCKS = [
    pytest.param(code, id=f"{page.name}-{i}")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("code", BLOCKS)
def test_python_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "documentation", "exec"), {})


def test_documentation_links_lead_somewhere():
    for page in (ROOT / "docs").glob("*.md"):
        for path in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / path).exists(), (page.name, path)


def test_named_files_and_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make ([\w-]+)", README.replace("Python 3.11 and make;", ""))) <= set(targets)
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README) + re.findall(r"`((?:data|examples)/[^`]+)`", README):
        assert (ROOT / path).exists(), path
