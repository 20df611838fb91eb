"""What every trainer needs: full-size models that accept narrow checkpoints, and forward() without autocast."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from apoptorch.errors import SurgeryError
from apoptorch.surgery import FOLLOWING, Surgery, named_tensors, narrow_


def narrow_on_load(model: nn.Module, followers: Sequence[nn.Module] = ()) -> nn.Module:
    """Let `model.load_state_dict` take checkpoints of a narrowed model: it narrows itself to their shapes first.

    Call it on a model built at full size, before the optimizer has state. Whatever is narrower in the checkpoint is
    narrowed, so that it must be one of the same architecture. Integer attributes of your own modules that apoptosis
    narrowed too (`self.head_dim`) are in the metadata of the state dict, which `torch.save` keeps and safetensors
    doesn't: `apoptorch.save` writes them in any case. `followers`: copies (an average) that are narrowed alike. Returns
    the model.
    """
    model.register_load_state_dict_pre_hook(partial(_narrow, followers=followers))
    for module, *copies in zip(model.modules(), *(follower.modules() for follower in followers), strict=False):
        module.register_load_state_dict_pre_hook(partial(_resize, followers=copies))
    return model


def _narrow(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any, followers: Sequence[nn.Module]) -> None:
    shapes = {name: state[prefix + name].shape for name in named_tensors(module) if prefix + name in state}
    with _reporting(rest[-1]):
        narrow_(module, shapes, followers=followers)


def _resize(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any,
    followers: Sequence[nn.Module],
) -> None:  # fmt: skip
    if isinstance(sizes := metadata.get(FOLLOWING), dict):
        with _reporting(rest[-1]), Surgery(module, (), followers) as surgery:
            surgery.resize_({"": sizes})


@contextmanager
def _reporting(messages: list[str]) -> Iterator[None]:
    """load_state_dict reports what fails with everything else that doesn't fit."""
    try:
        yield
    except SurgeryError as error:
        messages.append(str(error))


@contextmanager
def plain_forward(model: nn.Module) -> Iterator[None]:
    """Without the autocast that accelerate wraps around forward(): removals are planned in the weights' own dtype."""
    wrapped = vars(model).pop("forward", None) if "_original_forward" in vars(model) else None
    try:
        yield
    finally:
        if wrapped is not None:
            vars(model)["forward"] = wrapped
