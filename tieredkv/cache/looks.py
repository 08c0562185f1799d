"""Looks: how much attention every chunk of a prompt got from each row of a question and from each step of its answer.

Recorded while they are computed, summed over heads and layers. What it says of a video is in `evidence.py`.
"""

from __future__ import annotations

import torch


class Looks:
    """One question and its answer. Rows are numbered as they come; all of it is on the host."""

    def __init__(self, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens
        self.question = torch.zeros((0, 0), dtype=torch.float32, device="cpu")
        """`(T, chunks)`: attention that each scored row of the prompt pays, over all heads, exact."""
        self.steps: list[torch.Tensor] = []
        """`(n,)` each: attention that a step's dynamic heads paid the chunks they chose, from `first_chunk` on."""
        self.first_chunk = 0
        self.heads = 0
        """Query heads that `steps` add up."""

    def add_rows(self, first_token: int, weights: torch.Tensor, tokens: int) -> None:
        """Add one layer's attention weights `(K, G, T, m)` on the tokens from `first_token` on, `tokens` in all."""
        c, (rows, m) = self.chunk_tokens, weights.shape[2:]
        if self.question.shape[0] != rows:
            self.question = torch.zeros((rows, -(-tokens // c)), dtype=torch.float32, device="cpu")
        first, last = first_token // c, (first_token + m - 1) // c
        chunk = torch.arange(first_token, first_token + m, device=weights.device) // c - first
        mass = torch.zeros((rows, last - first + 1), dtype=torch.float32, device=weights.device)
        mass.index_add_(1, chunk, weights.sum((0, 1)))
        self.question[:, first : last + 1] += mass.cpu()

    def seal(self, first_chunk: int, heads: int) -> None:
        """Say which chunk is the first that steps choose among, and how many query heads choose."""
        self.first_chunk, self.heads = first_chunk, heads

    def add_step(self, attended: list[torch.Tensor]) -> None:
        """Take what one step's heads on each device attended to, `(n,)`, and blank it for the next. Waits for them."""
        self.steps.append(torch.stack([one.to("cpu", copy=True) for one in attended]).sum(0))
        for one in attended:
            one.zero_()
