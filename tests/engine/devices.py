"""Where the tests of the engine compute: on the CPU, and on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# The comparisons with the CPU are of float32, and so must the GPU's arithmetic be.
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def placed(device: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The engine's ``settings`` on a device."""
    return settings if device == "cpu" else settings | {"extra": (*settings.get("extra", ()), ("use_gpu", True))}
