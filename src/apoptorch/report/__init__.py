"""What a run's history says: an HTML page, a table, a live view, TensorBoard; pictures in `figures` (matplotlib)."""

from .html import write_html
from .live import LiveView, TensorBoard
from .record import Record, Recorder
from .terminal import history_table

__all__ = ["LiveView", "Record", "Recorder", "TensorBoard", "history_table", "write_html"]
