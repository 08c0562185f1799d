"""The gated delta rule over many chunks at once, differentiable, with little work between chunks.

Each step decays the state S by a, then moves the value stored under k towards v by the share beta:
S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T, o_t = S_t^T q_t (Yang et al., Gated Delta Networks, section
3.1). Within a chunk that begins with state S, all corrections u_t = beta_t (v_t - ...) solve one triangular system,
whose solution is U - W S. So a chunk maps its state to A S + B, and only these products run in sequence.

Shapes: `N` sequences, `H` value heads, `L` tokens, `K` key dim, `V` value dim.
"""

import torch
from torch.nn.functional import pad


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None = None,
    chunk: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs `(N, H, L, V)` and the state `(N, H, K, V)` after the last token, both float32.

    q, k: `(N, H, L, K)`, scaled by the caller. v: `(N, H, L, V)`. log_decay, beta: `(N, H, L)`. state: that before the
    first token, zeros if None. Autocast does not apply here.
    """
    length = q.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        chunk = min(chunk, length)
        short = -length % chunk  # padding neither decays nor writes
        q, k, v = (pad(x.float(), (0, 0, 0, short)).unflatten(2, (-1, chunk)) for x in (q, k, v))
        log_decay, beta = (pad(x.float(), (0, short)).unflatten(2, (-1, chunk)) for x in (log_decay, beta))

        since = log_decay.cumsum(-1)  # log of the decay since the chunk's beginning, (N, H, chunks, chunk)
        between = (since[..., :, None] - since[..., None, :]).tril().exp().tril()
        decayed = since.exp()[..., None]
        left = since[..., -1:, None]
        system = (beta[..., None] * (k @ k.transpose(-1, -2)) * between).tril(-1)
        system = system + torch.eye(chunk, dtype=system.dtype, device=system.device)
        right = torch.cat([v, k * decayed], dim=-1) * beta[..., None]
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        new, old = solved.split([v.shape[-1], k.shape[-1]], dim=-1)  # U, W
        kept = (k * (left - since[..., None]).exp()).transpose(-1, -2)
        identity = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
        carry, write = left.exp() * identity - kept @ old, kept @ new  # A, B

        if state is None:
            state = torch.zeros_like(write[:, :, 0])
        states = []
        for a, b in zip(carry.unbind(2), write.unbind(2), strict=True):
            states.append(state)
            state = a @ state.float() + b
        before = torch.stack(states, dim=2)
        output = (q * decayed) @ before + ((q @ k.transpose(-1, -2)) * between) @ (new - old @ before)
        return output.flatten(2, 3)[:, :, :length], state
