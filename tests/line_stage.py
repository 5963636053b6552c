"""A stage of training that takes a millisecond a step: a line is fitted to noise, out of a stream."""

import torch
from torch import nn

from mm_interleaved.training.settings import StageConfig
from mm_interleaved.training.stage import Losses

CONFIG = StageConfig(
    steps=4, learning_rate=1e-2, warmup_steps=1, ema_decay=0.9, save_every=1, log_every=1, keep_checkpoints=1
)


class Line:
    """A stage that fits a line to noise, and reads a stream."""

    name = "line"

    def __init__(self):
        self.part = nn.Linear(3, 1)
        with torch.no_grad():
            for parameter in self.part.parameters():
                parameter.fill_(0.5)
        self.read = 0

    def trained_parts(self):
        return {"part": self.part}

    def make_batch(self, step):
        assert self.read == step, "the stream is where the run is"
        self.read += 1
        return torch.randn(4, 3)

    def compute_losses(self, batch):
        loss = (self.part(batch) - batch.sum(1, keepdim=True)).square().mean()
        return Losses(loss, {"loss": loss}, {"rows": len(batch)})

    def state(self):
        return {"read": self.read}

    def load_state(self, state):
        self.read = state["read"]

    def summing_gradients(self, is_last):
        return torch.enable_grad()
