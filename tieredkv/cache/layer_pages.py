"""LayerPages: the pool pages that one layer's heads attend to while decoding, and the page table.

The pages of a head: its recent region and the generated tokens; then, for a static head, the tokens kept by pruning;
for a dynamic head, the sink chunks and the chunks selected in this step.
"""

from __future__ import annotations

import torch

from tieredkv.cache.decode_phase import DecodePhase
from tieredkv.cache.filling import Filling, numbers
from tieredkv.codecs.base import FIT_TOKENS, Codec, Fit
from tieredkv.errors import BudgetError
from tieredkv.memory.host import HostLayer
from tieredkv.memory.units import ceil_div
from tieredkv.ops import torch_ops
from tieredkv.ops.base import Pages
from tieredkv.planning.decode_plan import gather_bytes
from tieredkv.policy import prune


class LayerPages:
    """Pages and tables of one layer. Whatever is copied to the device here is counted as warm.

    Shapes: `K` KV heads, `H` query heads, `P` columns of the table, `C` tokens of a page, `N` prompt tokens.
    """

    def __init__(self, host: HostLayer, phase: DecodePhase, width: int) -> None:
        """host: all prompt tokens. width: P. Plans the recent region; the caller plans the other pages, then calls
        `fill`."""
        self.host, self.phase = host, phase
        self.device = phase.pool.records.device
        heads, self._c = host.num_heads, host.chunk_tokens
        self.table = phase.ledger.empty("tables", (heads, width), torch.int32, self.device)
        """`(K, P)`: pool slots."""
        self.lengths = phase.ledger.empty("tables", (heads, width), torch.int32, self.device)
        """`(K, P)`: tokens of each page that are attended to."""
        self.filling = Filling(heads, width, self._c)
        """What both, and the pages, hold at first; until `fill`."""
        self.pool = Pages(phase.pool.codec, phase.pool.records, self._fit(phase.pool.codec))
        """The pool, as this layer's heads read and write it."""
        first = phase.plan.layout.recent_start
        self.recent_tokens, self.generated = host.length - first, 0
        """Tokens in the recent region, prompt and generated; and the generated ones alone."""
        self._recent_length = torch.full((heads, 2), self.recent_tokens, dtype=torch.int32, device=self.device)
        """`recent_tokens` on the device, where a captured step reads and advances it (`Ops.append`)."""
        self._plan_recent(phase.plan.layout.recent_pages, first)

    def _fit(self, codec: Codec) -> Fit | None:
        """The host's if it is packed; if it is not, and pages are, they are fitted to its first tokens."""
        if not codec.needs_fit:
            return None
        fit = self.host.fit
        if fit is None:
            fit = codec.fit(*self.host.decoded(0, min(self.host.length, FIT_TOKENS)))
        assert fit is not None
        shape = fit.centre.shape
        parts = [self.phase.ledger.empty("tables", shape, torch.float32, self.device) for _ in range(2)]
        centre, channels = (
            own.copy_(new, non_blocking=True) for own, new in zip(parts, (fit.centre, fit.channels), strict=True)
        )
        return Fit(centre, channels)

    @property
    def first_selected(self) -> int:
        """Column of the table from which a dynamic head's selected chunks are listed."""
        layout = self.phase.plan.layout
        return layout.recent_pages + layout.sink_chunks

    # ---- the seal

    def _plan_recent(self, pages: int, first_token: int) -> None:
        heads, c = self.host.num_heads, self._c
        filled = ceil_div(self.recent_tokens, c)
        slots = numbers(self.phase.pool.take(heads * pages)).view(heads, pages)
        self.filling.table[:, :pages] = slots.int()
        self.filling.lengths[:, :pages] = (self.recent_tokens - c * torch.arange(pages, device="cpu")).clamp(0, c)
        ids = (first_token // c + torch.arange(filled, device="cpu")).repeat(heads)
        owners = torch.arange(heads, device="cpu").repeat_interleave(filled)
        self.filling.copy(owners, ids, slots[:, :filled].flatten())

    def plan_whole(self, heads: torch.Tensor) -> None:
        """Static heads `(m,)`, on the host, that keep everything: nothing has to be pruned."""
        layout = self.phase.plan.layout
        slots = self.phase.pool.take(len(heads) * layout.old_chunks)
        self.filling.attend(heads, range(layout.old_chunks), slots, layout.recent_pages)

    def plan_sinks(self, heads: torch.Tensor) -> None:
        """The sink chunks of dynamic heads `(n,)`, on the host."""
        layout = self.phase.plan.layout
        slots = self.phase.pool.take(len(heads) * layout.sink_chunks)
        self.filling.attend(heads, range(layout.sink_chunks), slots, layout.recent_pages)

    def fill_static(self, head: int, pages: int, saliency: torch.Tensor, is_text: torch.Tensor) -> None:
        """Prune a head to `pages` pages of the tokens before the recent region, and copy these. saliency, is_text:
        `(N,)`."""
        if pages == 0:
            return
        tiers, c = self.phase.tiers, self._c
        policy, old = tiers.policy, self.phase.plan.layout.recent_start

        def read() -> tuple[torch.Tensor, torch.Tensor]:
            return self.host.tokens(head, torch.arange(old, device="cpu"))

        tokens = prune.HeadTokens(saliency[:old], is_text[:old], tiers.sink_tokens, policy.saliency_pool, read)
        kept, slots = prune.kept_tokens(policy.rank(tokens), pages * c), numbers(self.phase.pool.take(pages))
        columns = slice(first := self.phase.plan.layout.recent_pages, first + pages)
        self.filling.table[head, columns] = slots.int()
        filled = kept.numel() - c * torch.arange(pages, device="cpu")
        self.filling.lengths[head, columns] = filled.clamp(0, c).int()
        slots = slots.to(self.device, non_blocking=True)
        if policy.merge is None:
            self.phase.ops.keep(self.host, self.pool, head, kept, slots)
        else:
            torch_ops.write(*policy.merge(tokens, kept), self.pool, head, slots)
        self.phase.counters.warm_bytes += kept.numel() * self.host.codec.chunk_bytes // c

    def fill(self) -> None:
        """Copy the page table, and all chunks planned for it, to the device. Does not wait for a card."""
        phase, filling = self.phase, self.filling
        self.table.copy_(filling.table, non_blocking=True)
        self.lengths.copy_(filling.lengths, non_blocking=True)
        heads, chunks, slots = filling.copies()
        phase.ops.fetch(self.host, self.pool, heads, chunks, slots.to(self.device, non_blocking=True))
        phase.counters.warm_bytes += len(chunks) * self.host.codec.chunk_bytes
        if within := self.recent_tokens % self._c:  # the rest of the host's last chunk was never written
            column = self.recent_tokens // self._c
            first, pages = int(filling.table[0, column]), phase.plan.layout.recent_pages
            last = self.pool.records[first : first + (self.host.num_heads - 1) * pages + 1 : pages]
            for field in self.pool.codec.fields(last):
                field[:, within:] = 0
        del self.filling

    def _set_recent_lengths(self) -> None:
        """Make every head attend to the tokens of the recent region counted so far."""
        pages, c = self.phase.plan.layout.recent_pages, self._c
        starts = torch.arange(pages, device=self.device) * c
        self.lengths[:, :pages] = (self.recent_tokens - starts).clamp(0, c)

    # ---- steps

    def advance(self) -> None:
        """Count a generated token. Raises `BudgetError` if there is no room for it."""
        if self.recent_tokens // self._c >= self.phase.plan.layout.recent_pages:
            raise BudgetError(
                f"the device has room for {self.generated} generated tokens and no more: ask for a larger "
                "max_new_tokens before generating, so that it is reserved."
            )
        self.recent_tokens += 1
        self.generated += 1

    def go_back(self, generated: int) -> None:
        """Count only `generated` generated tokens."""
        self.recent_tokens -= self.generated - generated
        self.generated = generated

    def rewind(self, tokens: int) -> None:
        """Forget the last `tokens` generated tokens: they are about to be appended once more."""
        self.go_back(self.generated - tokens)
        self._recent_length -= tokens
        self._set_recent_lengths()

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write the key and value, each `(K, D)`, of the token counted last."""
        self.phase.ops.append(key, value, self.pool, self.table, self.lengths, self._recent_length)

    def attend(
        self,
        query: torch.Tensor,
        scaling: float,
        page_lse: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend with queries `(H, n, D)` to everything in the table: output of `dtype`, and lse float32.

        page_lse `(H, >= P)`: is set to the log-sum-exp of each page's logits (`Ops.paged_attention`).
        """
        phase = self.phase
        with phase.ledger.scratch("scratch", self.scratch_bytes):
            return phase.ops.paged_attention(
                query, self.pool, self.table, self.lengths, scaling, phase.plan.scratch_pages, page_lse, dtype
            )

    @property
    def scratch_bytes(self) -> int:
        """Device bytes that `attend` takes."""
        return gather_bytes(self.phase.shape, self.phase.tiers, self.phase.plan, self.table.numel())

    def as_stored(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(K, n, D)` as attention reads them from pages, in their own dtype."""
        codec, fit = self.pool.codec, self.pool.fit
        read_keys, read_values = codec.decode(codec.encode(keys, values, fit), fit)
        return read_keys.to(keys.dtype), read_values.to(values.dtype)

    # ---- the end

    def generated_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each `(K, generated, D)` on the host, of the tokens decoded since the seal.

        Copied page by page, so that no second copy of them is ever on the device; packed pages are unpacked.
        """
        shape = (2, self.host.num_heads, self.generated, self.host.head_dim)
        tokens = torch.empty(shape, dtype=self.host.dtype, device="cpu")
        first, c = self.recent_tokens - self.generated, self._c
        for head in range(self.host.num_heads):
            for column in range(first // c, ceil_div(self.recent_tokens, c)):
                start, stop = max(first, column * c), min(self.recent_tokens, (column + 1) * c)
                page = self.pool.records[self.table[head, column].long()]
                read = tuple(
                    field[None, start - column * c : stop - column * c] for field in self.pool.codec.fields(page)
                )
                fit = None if self.pool.fit is None else self.pool.fit.of_heads(slice(head, head + 1))
                for part, decoded in zip(tokens, self.pool.codec.decode(read, fit), strict=True):
                    part[head, start - first : stop - first] = decoded[0]
        return tokens[0], tokens[1]
