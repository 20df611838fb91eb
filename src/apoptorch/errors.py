"""The exceptions that apoptorch raises. Every one is an `ApoptosisError`."""


class ApoptosisError(Exception):
    """Base class: catch it to catch everything that this package raises on purpose."""


class ArgumentError(ApoptosisError, ValueError):
    """One or several arguments are wrong; nothing was changed. `problems` lists every one."""

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        lines = self.problems if len(self.problems) == 1 else [f"  {i}. {p}" for i, p in enumerate(self.problems, 1)]
        head = "" if len(lines) == 1 else f"{len(lines)} problems, nothing was changed:\n"
        super().__init__(head + "\n".join(lines))


class ExportError(ApoptosisError, RuntimeError):
    """torch.export could not capture the model, in training mode nor in eval mode."""


class SurgeryError(ApoptosisError, RuntimeError):
    """An event failed half-way; model, optimizer and followers were put back bit for bit."""


class CheckpointError(ApoptosisError, ValueError):
    """A checkpoint doesn't fit the model, or its manifest is not to be trusted."""


class RanksError(ApoptosisError, RuntimeError):
    """A rank of the process group was lost. What was not finished was undone; resume from the last checkpoint."""


class AbandonedError(ApoptosisError):
    """An event was given up on all ranks together; nothing was changed. `Apoptosis` turns it into a history entry."""
