"""The real data that the examples and benchmarks train on, behind one interface: a function that returns a `Split`.

Every function takes the path of the official files; what is downloaded is kept in `sources.CACHE` and verified.
"""

from .higgs import HIGGS_SAMPLE, higgs
from .images import cifar10, digits, fashion_mnist, image_folder, mnist
from .split import Split, validation
from .text import CHARACTERS, text

__all__ = [
    "CHARACTERS",
    "HIGGS_SAMPLE",
    "Split",
    "cifar10",
    "digits",
    "fashion_mnist",
    "higgs",
    "image_folder",
    "mnist",
    "text",
    "validation",
]
