"""Training what a block was stored as on what the original block gives (as in BRECQ [2102.05426]).

The loss is the squared error of the block's output on the calibration text, whose earlier blocks are compressed. One
batch a step, with Adam, whose steps shrink to nothing. What is trained is the scheme's: see `Scheme.trainable`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from compress.blocks import Blocks

RATE = 0.02  # of Adam at first; parameters are in units of what they change


class Trainable(Protocol):
    """A weight whose parameters can be trained. multiply: (..., in_features) to (..., out_features), float32."""

    parameters: list[Tensor]

    def multiply(self, x: Tensor) -> Tensor: ...


def train(blocks: Blocks, original: Blocks, block: str, layers: Mapping[str, Trainable], steps: int) -> None:
    """Trains the layers of an open block, which multiply in the place of their modules meanwhile.

    original: where the block is closed, and what it gave is there.
    """
    optimizer = torch.optim.Adam([p for layer in layers.values() for p in layer.parameters], RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, steps)
    with blocks.replaced({module: layer.multiply for module, layer in layers.items()}):
        for step in range(steps):
            batch = step % blocks.batches
            wanted = original.given(block, batch)
            loss = (blocks.gives(block, batch) - wanted).square().sum() / wanted.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def error(blocks: Blocks, original: Blocks, block: str) -> float:
    """What an open block now gives, beside what the original gave: |y - o| / |o| over all of the text."""
    missed = whole = 0.0
    with torch.no_grad():
        for batch in range(blocks.batches):
            wanted = original.given(block, batch)
            missed += float((blocks.gives(block, batch) - wanted).double().square().sum())
            whole += float(wanted.double().square().sum())
    return math.sqrt(missed / whole) if whole else math.sqrt(missed)
