"""Characters of text, for language models."""

import sysconfig
from pathlib import Path

import numpy as np
import torch

from .split import Split

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # everything else becomes "?", a tab four spaces
SUFFIXES = (".py", ".txt", ".md", ".rst")


def text(path: str | Path | None = None, *, block: int = 128, characters: int | None = 4_000_000) -> Split:
    """Text in blocks: characters [n, block] int64, indices into `CHARACTERS`, and for each of them the next one.

    The last tenth of the text is the test set; blocks don't overlap.

    path: a text file, or a directory whose .py, .txt, .md and .rst files are read in the order of their names; None
        for the source of Python's standard library, which is on every machine but differs between versions.
    characters: read no more than so many, spread evenly over the text; None for all.

    Raises:
        FileNotFoundError: there is no such file or directory.
        ValueError: the text is too short for a block in each split.
    """
    source = Path(sysconfig.get_path("stdlib")) if path is None else Path(path).expanduser()
    codes = _encoded(_files(source))
    if characters is not None and len(codes) > characters:
        codes = _thinned(codes, characters, block + 1)
    blocks = len(codes) // (block + 1)
    if blocks < 2:
        raise ValueError(
            f"`path` must hold at least {2 * (block + 1)} characters, got {len(codes)} ({source}). "
            "Give more text or a smaller `block`."
        )
    rows = torch.from_numpy(codes[: blocks * (block + 1)].reshape(blocks, block + 1).astype(np.int64))
    train, test = rows[: -max(1, blocks // 10)], rows[-max(1, blocks // 10) :]
    return Split(
        train[:, :-1].contiguous(), train[:, 1:].contiguous(), test[:, :-1].contiguous(), test[:, 1:].contiguous()
    )


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if source.is_dir():
        found = [file for file in sorted(source.rglob("*")) if file.suffix in SUFFIXES and _wanted(file, source)]
        if found:
            return found
    raise FileNotFoundError(
        f"`path` must be a text file or a directory with {', '.join(SUFFIXES)} files, got {source}. "
        "Leave it out for the source of Python's standard library."
    )


def _wanted(file: Path, source: Path) -> bool:
    """Not of installed packages, nor of the standard library's tests."""
    return file.is_file() and not {"site-packages", "dist-packages", "test", "tests"} & set(
        file.relative_to(source).parts
    )


def _encoded(files: list[Path]) -> np.ndarray:
    table = np.full(256, CHARACTERS.index("?"), np.uint8)
    table[[ord(character) for character in CHARACTERS]] = np.arange(len(CHARACTERS))
    raw = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    return table[np.frombuffer(raw.expandtabs(4).encode("latin-1", errors="replace"), np.uint8)]


def _thinned(codes: np.ndarray, characters: int, unit: int) -> np.ndarray:
    """About so many characters: of all stretches of `unit`, evenly many from everywhere."""
    stretches = codes[: len(codes) // unit * unit].reshape(-1, unit)
    chosen = np.linspace(0, len(stretches) - 1, max(2, characters // unit)).astype(int)
    return stretches[chosen].ravel()
