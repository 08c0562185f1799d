"""Evidence to draw, and hostile text."""

from __future__ import annotations

import torch

from tieredkv.evidence.moments import Evidence, find_moments

ATTACK = '</title><script src="http://evil.example/x.js">alert(1)</script> & $title ${x} "'


def evidence(peaks: dict[int, float], steps: int = 40, start: float = 0.0, step: float = 0.5) -> Evidence:
    heat = torch.zeros(steps)
    for place, value in peaks.items():
        heat[place] = value
    end = start + steps * step
    return Evidence(find_moments(heat, start, end, step), heat, start, end, step)
