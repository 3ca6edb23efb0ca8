"""Models whose ports are open: a fresh model's let no advice through, where a mistake could hide."""

from __future__ import annotations

import torch

from pylon_trainer.models import Decoder
from pylon_trainer.models.ports import Port


def open_ports(model: Decoder) -> Decoder:
    """Give it advice, and ports that act on it; without ports it stays as it is."""
    ports = [module for module in model.modules() if isinstance(module, Port)]
    if ports:
        model.get_buffer("advice_PR").uniform_(-1, 1)
        for port in ports:
            torch.nn.init.normal_(port.write, std=0.3)
    return model
