"""What a run's history says: a table for the terminal, a picture, an HTML page. The core does without it."""

try:
    from apoptorch.report.figures import plot_metric, plot_widths, save_comparison
    from apoptorch.report.html import write_html
    from apoptorch.report.terminal import history_table
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"apoptorch.report needs {error.name}, which is not installed. Run `pip install 'apoptorch[report]'`."
    ) from error

__all__ = ["history_table", "plot_metric", "plot_widths", "save_comparison", "write_html"]
