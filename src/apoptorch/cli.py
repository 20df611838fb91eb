"""The command line `apoptorch`: demo, inspect, shrink, report, doctor.

Exit codes: 0 done, 1 it can't be done (the message says why), 2 the command line itself is wrong. With --json, standard
output is one JSON object in every case but the last; a failure is {"error": "..."}.
"""

import copy
import functools
import sys
from collections.abc import Callable
from itertools import tee
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from .architecture import architecture
from .checkpoint import save
from .errors import ApoptosisError, ArgumentError
from .named_objects import built_model, calibration_data, example_inputs, named_object
from .plan import Event

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Adaptive neuron apoptosis: find and remove the redundant neurons of a PyTorch network.",
    epilog="Exit codes: 0 done, 1 it can't be done, 2 the command line is wrong. `apoptorch COMMAND --help` says more.",
)  # fmt: skip
console, complaints = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="package.module:build_model or path/file.py:build_model, "
    "a model or a function or class that returns one when called without arguments.")]  # fmt: skip
Inputs = Annotated[list[str], typer.Option("--input", metavar="SHAPE", help="Shape of an input: 1x3x224x224, "
    "2x16:int64, or input_ids=2x16:int64 by keyword. Once for each tensor that forward() takes.")]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Weights = Annotated[Path | None, typer.Option(help="Fill the model first: a directory that apoptorch.save wrote, or a "
    ".safetensors file of its state_dict.")]  # fmt: skip


def answers(command: Callable[..., Any]) -> Callable[..., None]:
    """A command that returns (answer for --json, what to print otherwise); its known errors end it with exit code 1."""

    @functools.wraps(command)
    def answering(*args: Any, json: bool = False, **options: Any) -> None:
        try:
            answer, *printed = command(*args, json=json, **options)
        except (ApoptosisError, OSError) as error:
            if json:
                _print_json({"error": str(error)})
            complaints.print(f"error: {error}", style="red", markup=False, highlight=False)
            raise typer.Exit(1) from None
        if json:
            _print_json(answer)
        else:
            for item in printed:
                console.print(item, markup=False, highlight=False)
        if answer.get("healthy") is False:
            raise typer.Exit(1)

    return answering


@app.command()
@answers
def inspect(model: Model, input: Inputs, weights: Weights = None, json: Json = False):
    """Show the channel groups of a model, and which of them can shrink.

    Shares are those of the weights that make or read a group's channels.

    Example: apoptorch inspect torchvision.models:resnet18 --input 1x3x224x224
    """
    from .inspection import inspected

    found = inspected(built_model(model, weights), example_inputs(input))
    table = Table("group", "neuron", "width", "parameters", "FLOPs", "can shrink")
    for column in table.columns[2:5]:
        column.justify = "right"
    for group in found["groups"]:
        shares = (f"{group[key]:.1%}" for key in ("parameter_share", "flops_share"))
        can = "yes" if group["prunable"] else f"no: {group['reason']}"
        table.add_row(group["name"], group["neuron"], f"{group['width']:,}", *shares, can)
    free = sum(group["prunable"] for group in found["groups"])
    total = f"{found['model']}: {found['parameters']:,} parameters, {found['flops']:.3g} forward FLOPs for these inputs"
    return found, table, f"{total}; {free} of {len(found['groups'])} groups can shrink"


@app.command()
@answers
def shrink(
    model: Model, input: Inputs, weights: Weights = None,
    data: Annotated[str | None, typer.Option(help="package.module:loader, batches or a function that returns them: "
        "(inputs, targets) with --loss, else inputs.")] = None,
    loss: Annotated[str | None, typer.Option(help="package.module:loss_fn, called as loss_fn(output, targets), such as "
        "torch.nn.functional:cross_entropy.")] = None,
    max_loss_increase: Annotated[float | None, typer.Option(min=0, help="Remove as much as raises the loss on held-out "
        "data by at most this (without --loss: the output's relative mean squared change).")] = None,
    bound: Annotated[float | None, typer.Option(min=0, help="Without --data: largest change of the output (Euclidean "
        "norm) for any input. Left out: exact redundancy only.")] = None,
    input_norm: Annotated[float | None, typer.Option(min=0, help="Without --data: the largest norm of an input for "
        "which the bound holds. Left out: that of the random --input.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to write the shrunk model to: safetensors, manifest and "
        "architecture.json. Left out: nothing is written.")] = None,
    json: Json = False,
):  # fmt: skip
    """Remove the redundant neurons of a trained model.

    With --data by what they compute on it; without, by the weights alone, with a bound on what it may change.

    Example: apoptorch shrink my.nets:build --weights run/ --input 1x784 --data my.data:batches
    --loss torch.nn.functional:cross_entropy --max-loss-increase 0.01 --out small/
    """
    from .shrink import shrink as shrink_

    if data is None and (max_loss_increase is not None or loss is not None):
        raise ArgumentError(["`--data` must be given with --loss and --max-loss-increase. Without it, use --bound."])
    full, inputs = built_model(model, weights), example_inputs(input)
    settings = {"loss_fn": named_object(loss, "--loss") if loss else None, "bound": bound, "input_norm": input_norm}
    batches = None if data is None else calibration_data(data)
    if max_loss_increase is None:
        small, event = full, shrink_(full, batches, example_inputs=inputs, **settings)
    else:
        small, event = _shrink_within(max_loss_increase, full, batches, inputs, settings)
    if out is not None:
        save(small, out)
        text = dumps(architecture(small), indent=1)
        (out / "architecture.json").write_text(text, encoding="utf-8")
    table = Table("group", "before", "after")
    for name, before in event.widths_before.items():
        table.add_row(name, f"{before:,}", f"{event.widths_after[name]:,}")
    written = f"; written to {out}" if out else ""
    return {"event": event.to_json(), "out": str(out) if out else None}, table, _outcome(event) + written


def _shrink_within(limit: float, full: Any, batches: Any, inputs: Any, settings: dict[str, Any]) -> tuple[Any, Event]:
    """The largest removal, of budgets limit, limit / 2, ..., whose measured loss increase stays within the limit."""
    from .shrink import shrink as shrink_

    for halvings in range(8):
        small, (batches, own) = copy.deepcopy(full), tee(batches)
        event = shrink_(small, own, example_inputs=inputs, budget=limit / 2**halvings, **settings)
        if not event.rolled_back and (event.measured is None or event.measured <= limit):
            return small, event
    raise ArgumentError([
        f"`--max-loss-increase` must leave room for something to go, got {limit:g}: every removal that was tried, down "
        f"to a predicted {limit / 2**7:.1g}, cost more on held-out data. Allow more, or train on."
    ])  # fmt: skip


def _outcome(event: Event) -> str:
    if event.rolled_back:
        return f"undone: {event.reason}"
    if not event.changes:
        return f"nothing was removed: {event.reason}"
    fewer = event.parameters_before / event.parameters_after
    text = f"{event.parameters_before:,} -> {event.parameters_after:,} parameters ({fewer:.2f}x fewer)"
    if event.measured is not None:
        text += f", measured loss change {event.measured:+.3g}"
    if event.certificate is not None and event.certificate.changed_upper is not None:
        upper, confidence = event.certificate.changed_upper, event.certificate.confidence
        text += f", at most {upper:.2%} of predictions change (confidence {confidence:.0%})"
    return text + (f", the output moves by at most {event.bound:.3g}" if event.bound is not None else "")


@app.command()
@answers
def report(
    history: Annotated[Path, typer.Argument(metavar="HISTORY", help="A history.json, as the demo writes it.")],
    out: Annotated[Path | None, typer.Option(help="The page to write. Left out: report.html beside HISTORY.")] = None,
    json: Json = False,
):
    """Turn a run's history into one HTML page.

    Example: apoptorch report runs/demo/history.json
    """
    from .report import Record, history_table, write_html

    record = Record.read(history)
    page = out or history.with_name("report.html")
    try:
        write_html(record, page)
        answer = {"report": str(page), "events": [event.to_json() for event in record.events]}
        return answer, history_table(record.events), f"written: {page}"
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # who knows what it holds
        text = f"{type(error).__name__}: {error}"
        raise ArgumentError(
            [f"`history` must be as apoptorch wrote it, got {history}: {text}. It is damaged."]
        ) from error


@app.command()
@answers
def demo(
    out: Annotated[Path, typer.Option(help="Directory for history.json and report.html.")] = Path("runs/demo"),
    width: Annotated[int, typer.Option(min=16, help="Neurons in each of three hidden layers.")] = 1024,
    steps: Annotated[int, typer.Option(min=60, help="Training steps of each run.")] = 1500,
    seed: int = 0,
    json: Json = False,
):
    """Train a network twice, dense and with apoptosis.

    On generated data, in about a minute on two cores.
    """
    from .demo import compare

    summary = compare(out, width, steps, seed, show=None if json else console.print)
    table = Table("", "dense", "apoptosis")
    for key in summary["dense"]:
        table.add_row(key, *(f"{summary[name][key]:,.4g}" for name in ("dense", "apoptosis")))
    return summary, table, f"written: {out}/history.json, {out}/report.html"


@app.command()
@answers
def doctor(json: Json = False):
    """Try what apoptosis needs, and list versions."""
    from .doctor import diagnosis

    found = diagnosis()
    versions = ", ".join(f"{name} {version or '-'}" for name, version in found["packages"].items())
    table = Table("check", "", "found", "s")
    for check in found["checks"]:
        table.add_row(check["name"], "ok" if check["passed"] else "FAILED", check["found"], f"{check['seconds']:.1f}")
    where = f"Python {found['python']} on {found['platform']}, {found['threads']} threads"
    return found, where, versions, f"devices: {', '.join(found['devices'])}", table


def _print_json(answer: dict[str, Any]) -> None:
    print(dumps(answer, indent=1))


def main() -> None:
    """The entry point: everything above, and an interrupt that ends quietly."""
    torch.manual_seed(0)  # random inputs and freshly built models are the same at every call
    try:
        app(prog_name="apoptorch")
    except KeyboardInterrupt:
        sys.exit(130)
