"""A tower that is kept as it is: no gradient, no statistics, no dropout, whatever mode the model around it is put in."""

from typing import Any

import torch
from torch import Tensor, nn


class Freezable(nn.Module):
    """A network `net` that `freeze` takes out of the training; its tensors stay in the state dict."""

    net: nn.Module
    frozen: bool = False

    def freeze(self) -> None:
        """From now on: evaluation mode even after `train()`, no parameter wants a gradient, the forward pass records none."""
        self.frozen = True
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Freezable":
        return super().train(mode and not self.frozen)

    def forward(self, inputs: Tensor) -> Any:
        if self.frozen:
            with torch.no_grad():
                return self.net(inputs)
        return self.net(inputs)
