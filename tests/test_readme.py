"""What README shows must run as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = re.sub(r"<!--.*?-->", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_run(code):
    exec(compile(code, "README.md", "exec"), {})


def test_named_files_and_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make ([\w-]+)", README.replace("Python 3.11 and make;", ""))) <= set(targets)
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README) + re.findall(r"`((?:data|examples)/[^`]+)`", README):
        assert (ROOT / path).exists(), path
