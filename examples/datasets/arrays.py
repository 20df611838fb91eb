"""Arrays that may be larger than memory: written to the cache piece by piece, read as they are indexed."""

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import sources


def stored(
    pieces: Iterable[np.ndarray],
    shape: tuple[int, ...],
    identity: list[Any],
    finish: Callable[[np.memmap], None] | None = None,
) -> Tensor:
    """The float32 pieces [m, *shape] one after the other as a tensor [n, *shape] that lies in a file of the cache.

    identity: what the content depends on, in JSON types or paths; a file with the same identity is used again, and
        the pieces are not asked for. finish: changes the written array in place, once.
    """
    folder = sources.CACHE / "arrays"
    name = hashlib.sha256(json.dumps(identity, default=str).encode()).hexdigest()[:24]
    file, unfinished = folder / f"{name}.f32", folder / f"{name}.part"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as out:
            for piece in pieces:
                out.write(np.ascontiguousarray(piece, np.float32).tobytes())
        if finish is not None:
            array = np.memmap(unfinished, np.float32, "r+").reshape(-1, *shape)
            finish(array)
            array.flush()
        unfinished.rename(file)
    return torch.from_numpy(np.memmap(file, np.float32, "c").reshape(-1, *shape))
