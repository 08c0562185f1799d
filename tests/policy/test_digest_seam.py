"""A fitted digest that the package does not know, used end to end: no other code depends on the kind of digest."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers import assert_near, cap_share, digest_nbytes, pressed, session_logits, tier_options

import tieredkv
from tieredkv import TieredCache
from tieredkv.cache.looks import Looks
from tieredkv.cache.question import Question
from tieredkv.environment.versions import cache_argument
from tieredkv.errors import OptionError
from tieredkv.planning import sizes
from tieredkv.policy.digests import DIGESTS, Digest, Fitted


@dataclass(frozen=True, slots=True)
class Centre(Fitted):
    """Mean key `(K, 1, D)`, and zeros `(K, D)` that only digesting needs."""

    centre: torch.Tensor
    ballast: torch.Tensor

    def for_ranking(self, heads):
        return Centre(self.centre[heads], self.ballast[:0])


class Centred(Digest[Centre]):
    """A chunk's mean key less the mean of all keys, in float16."""

    name = "centred"
    fitted_type = Centre

    @property
    def chunk_bytes(self):
        return 2 * self.head_dim

    @property
    def fitted_bytes(self):
        return 8 * self.head_dim

    @property
    def ranking_fitted_bytes(self):
        return 4 * self.head_dim

    def scratch_bytes(self, kv_heads, query_heads):
        return 4 * (kv_heads * self.head_dim + query_heads)

    def fit(self, query_moment, keys):
        return Centre(keys.float().mean(1, keepdim=True), query_moment.new_zeros(query_moment.shape[:2]))

    def make(self, keys, fitted):
        means = keys.float().mean(2) - fitted.centre + fitted.ballast.unsqueeze(1)
        return means.half().contiguous().view(torch.uint8)

    def chunk_logits(self, prepared, digests):
        return prepared @ digests.contiguous().view(torch.float16).float().mT

    def constant(self, query, fitted):
        return (query @ fitted.centre.mT).squeeze(-1)


class CentredMass(Centred):
    """The same, with logits that claim to estimate attention mass."""

    name = "centred mass"
    estimates_mass = True


@pytest.fixture(params=[Centred, CentredMass], ids=lambda kind: kind.name)
def kind(request, monkeypatch):
    monkeypatch.setitem(DIGESTS, request.param.name, request.param)
    return request.param


def options(kind, **tiers):
    return tier_options(digest=kind.name, theta=2.0, text_window=16, chunk_tokens=8, **tiers)


def test_where_everything_fits_answers_are_those_of_a_full_cache(kind, llama, prompt_ids):
    stock, tiers = llama(prompt_ids).logits[:, -8:], options(kind, gpu_kv_gb=1)
    with torch.no_grad(), tieredkv.use_attention(llama), TieredCache(llama.config, **tiers) as cache:
        llama(prompt_ids[:, :-8], **cache_argument(cache))
        rows = [llama(token, **cache_argument(cache)).logits for token in prompt_ids[:, -8:].split(1, dim=1)]
    assert_near(torch.cat(rows, dim=1), stock)


def test_few_chunks_are_chosen_under_the_cap_and_every_byte_is_counted(kind, llama, long_ids):
    tiers = options(kind, **pressed(llama, 900, 0.5))
    with torch.no_grad(), tieredkv.use_attention(llama), TieredCache(llama.config, **tiers) as cache:
        looks = Looks(8)
        cache.expect(Question(max_new_tokens=9, looks=looks))
        llama(long_ids, **cache_argument(cache))
        for token in range(5):
            llama(long_ids[:, token : token + 1], **cache_argument(cache))
            cache.decoding.record_step()
        layers = [layer.sealed for layer in cache.tiered_layers]
        layout, counters = layers[0].phase.plan.layout, cache.counters
        held = cache.ledger.by_purpose()["digests"]
        assert held == sum(digest_nbytes(layer.retrieval) for layer in layers)
        assert held == sizes.digest_bytes(cache.shape, cache.tiers, layout, counters.dynamic_heads)
        assert cache.ledger.peak_bytes <= cache.tiers.cap_bytes
        assert 0 < counters.selected < 5 * counters.dynamic_heads * layout.retrievable
        assert (counters.unseen_mass is not None) == kind.estimates_mass
        assert all(float(step.sum()) > 0 for step in looks.steps)


def test_only_heads_whose_digests_estimate_mass_adapt(kind, llama, long_ids):
    if not kind.estimates_mass:
        with pytest.raises(OptionError, match="adaptive=True is not valid"):
            tieredkv.TierConfig(**options(kind, adaptive=True))
        return
    tiers = options(kind, gpu_kv_gb=cap_share(llama, 900, 1), budget_ratio=0.1, spare_ratio=0.5, adaptive=True)
    with torch.no_grad(), tieredkv.use_attention(llama), TieredCache(llama.config, **tiers, max_new_tokens=9) as cache:
        llama(long_ids, **cache_argument(cache))
        for token in range(5):
            llama(long_ids[:, token : token + 1], **cache_argument(cache))
        sealed = cache.tiered_layers[0].sealed
        assert bool((sealed.retrieval.selected > sealed.phase.plan.selected[0]).any())


@pytest.mark.parametrize("share", [0.6, 3.0])
def test_a_session_answers_and_outlives_a_save(kind, video_model, processor, frames, tmp_path, share):
    settings = options(kind, **pressed(video_model, 280, share), recent_window=16)
    with tieredkv.open_session(video_model, frames, processor=processor, fps=4, **settings) as session:
        session.save(tmp_path / "kept")
        session_logits(session, "follow the moon for 4 ?", 2)
        want = session_logits(session, "what colour was the star ?", 6)
        centre = session._cached.cache.tiered_layers[0].digests.fitted.centre
    with tieredkv.load_session(tmp_path / "kept", video_model, processor=processor) as session:
        assert torch.equal(session._cached.cache.tiered_layers[0].digests.fitted.centre, centre)
        assert torch.equal(session_logits(session, "what colour was the star ?", 6), want)
