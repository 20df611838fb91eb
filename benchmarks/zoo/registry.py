"""All models of the zoo by name."""

from typing import Any

from .entries import Entry, Inputs
from .families import FAMILIES
from .language import TRANSFORMERS
from .vision import TIMM, TORCHVISION


def _family(name: str) -> Entry:
    def inputs(batch: int) -> Inputs:
        return FAMILIES[name](batch)[1], {}

    return Entry("hand-written", lambda: FAMILIES[name](2)[0], inputs)


ZOO: dict[str, Entry] = {**{name: _family(name) for name in FAMILIES}, **TORCHVISION, **TIMM, **TRANSFORMERS}


def import_sources() -> dict[str, str]:
    """Imports what the models come from, all at once; returns the versions."""
    from .vision import stub_torchvision

    stub_torchvision()
    import timm
    import torchvision
    import transformers

    _: Any = transformers.BertModel, transformers.LlamaModel  # transformers imports its parts when they are asked for
    return {module.__name__: module.__version__ for module in (torchvision, timm, transformers)}
