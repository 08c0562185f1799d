"""Looks: how much attention every chunk of a prompt gets from each row of a question and each step of its answer.

Summed over heads and layers as it is computed. `evidence` turns it into moments of the video.
"""

from __future__ import annotations

import torch


class Looks:
    """The record of one question and its answer, on the host."""

    def __init__(self, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens
        self.question = torch.zeros((0, 0), dtype=torch.float32, device="cpu")
        """`(T, chunks)`: attention of each scored row of the prompt to each chunk, summed over all heads; exact."""
        self.steps: list[torch.Tensor] = []
        """`(n,)` each: attention of a step's dynamic heads to each chunk they chose, from `first_chunk` on."""
        self.first_chunk = 0
        self.heads = 0
        """Query heads that `steps` sum over."""

    def add_rows(self, first_token: int, weights: torch.Tensor, tokens: int) -> None:
        """Add one layer's attention weights `(K, G, T, m)` on `m` of `tokens` tokens, from `first_token` on."""
        c, (rows, m) = self.chunk_tokens, weights.shape[2:]
        if self.question.shape[0] != rows:
            self.question = torch.zeros((rows, -(-tokens // c)), dtype=torch.float32, device="cpu")
        first, last = first_token // c, (first_token + m - 1) // c
        chunk = torch.arange(first_token, first_token + m, device=weights.device) // c - first
        mass = torch.zeros((rows, last - first + 1), dtype=torch.float32, device=weights.device)
        mass.index_add_(1, chunk, weights.sum((0, 1)))
        self.question[:, first : last + 1] += mass.cpu()

    def begin_answer(self, first_chunk: int, heads: int) -> None:
        """Set which chunk is the first that steps choose among, and how many query heads choose."""
        self.first_chunk, self.heads = first_chunk, heads

    def add_step(self, masses: list[torch.Tensor]) -> None:
        """Record one step's attention to each chunk, `(n,)` per device, and zero it. Waits for the devices."""
        self.steps.append(torch.stack([mass.to("cpu", copy=True) for mass in masses]).sum(0))
        for mass in masses:
            mass.zero_()
