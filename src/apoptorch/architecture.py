"""A model's architecture as readable JSON: every layer with its sizes as they are now."""

from typing import Any

from torch import nn


def architecture(model: nn.Module) -> dict[str, Any]:
    """Module path -> type, settings and parameter shapes of every module that has parameters or settings of its own.

    Settings are the plain values among a module's attributes (out_features, kernel_size, eps), so that the layers can
    be built again by hand, or by `nn` itself: `getattr(nn, entry["type"])`.
    """
    layers = {
        name: {
            "type": type(module).__name__,
            "settings": settings,
            "shapes": {key: list(tensor.shape) for key, tensor in module.state_dict().items() if "." not in key},
        }
        for name, module in model.named_modules()
        if (settings := _settings(module)) or list(module.parameters(recurse=False))
    }
    total = sum(parameter.numel() for parameter in model.parameters())
    return {"model": type(model).__name__, "parameters": total, "layers": layers}


def _settings(module: nn.Module) -> dict[str, Any]:
    """Public attributes that JSON can hold."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in vars(module).items()
        if not key.startswith("_") and key != "training" and _plain(value)
    }


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_plain(item) for item in value)
    return isinstance(value, bool | int | float | str)
