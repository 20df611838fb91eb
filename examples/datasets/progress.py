"""A progress bar on stderr, where someone looks at it and rich is installed."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(what: str, total: float) -> Iterator[Callable[[float], None]]:
    """Gives a function that moves the bar on by so much of `total`."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda amount: None
        return
    console = Console(stderr=True)
    with Progress(console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)
