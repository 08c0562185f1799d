"""Chunks are copied for a layer's predicted query: the same answers to the bit, and fewer chunks to wait for."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from helpers import TEXT_CONFIGS, LateCopies, decoded, pressed, random_text_model, tier_options

import tieredkv
from tieredkv.cache.foresight import Foresight
from tieredkv.cache.looks import Looks
from tieredkv.cache.question import CONTEXT, Question
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.environment.versions import cache_argument
from tieredkv.memory.copies import ThreadCopies
from tieredkv.models import families, sight

RANKED = {"theta": 2.0}
SETTINGS = {
    "ranked": RANKED,
    "static and dynamic": {},
    "adaptive": {"theta": 2.0, "adaptive": True},
    "4 bits": {"theta": 2.0, "host_kv_bits": 4},
    "no spare slots": {"theta": 2.0, "spare_ratio": 0.0},
    "boxes of keys": {"policy": "arkvale"},
    "reuse": {"theta": 2.0, "reuse_above": 0.5},
    "everything fits": {"theta": 2.0, "gpu_kv_gb": 1.0, "budget_ratio": None},
}
FORESEEING = {
    kind for decoder in families.DECODERS if decoder.mlp_norm for kind in decoder.model_types if kind in TEXT_CONFIGS
}


def answers(model, ids, looks=False, turns=1, copies=None, **options):
    """Logits of every step, chunks attended to and counters of each turn, and what evidence records."""
    tiers = {**pressed(model, 600, 0.5), "chunk_tokens": 8, "text_window": 16, **options}
    found, seen = [], []
    with (
        torch.no_grad(),
        tieredkv.use_attention(model),
        TieredCache(model.config, **tier_options(**tiers), copies=copies or LateCopies()) as cache,
    ):
        cache.expect(CONTEXT)
        for part in ids[:, :500].split(170, dim=1):
            model(part, **cache_argument(cache))
        cache.settle()
        for turn in range(turns):
            recorded = Looks(8) if looks else None
            cache.expect(Question(max_new_tokens=8, trace=True, looks=recorded))
            model(ids[:, 500 + 40 * turn : 540 + 40 * turn], **cache_argument(cache))
            cache.seal()
            logits = []
            for place in range(6):
                logits.append(model(ids[:, place : place + 1], **cache_argument(cache)).logits)
                cache.decoding.record_step()
            for layer in cache.tiered_layers:
                if layer.sealed.retrieval is not None:
                    layer.sealed.retrieval.residency.check_integrity()
            found.append((torch.cat(logits), cache.counters.trace, cache.counters))
            seen.append(recorded)
            cache.truncate(500)
    return found, seen


@pytest.fixture
def answers_without(monkeypatch):
    """`answers`, planned as with predictions, which take room, but without any."""

    def without(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(Foresight, "wants", lambda *_: False)
            return answers(*args, ahead=True, **options)

    return without


def assert_same(got, want):
    for (logits, trace, _), (wanted, other, _) in zip(got, want, strict=True):
        assert torch.equal(logits, wanted)
        assert len(trace) == len(other) > 0 or not trace
        for mine, theirs in zip(trace, other, strict=True):
            assert (mine.step, mine.layer) == (theirs.step, theirs.layer)
            assert torch.equal(mine.first_token, theirs.first_token)


@pytest.mark.parametrize("name", SETTINGS)
def test_answers_are_the_same_to_the_bit(llama, long_ids, answers_without, name):
    options = SETTINGS[name]
    want, _ = answers_without(llama, long_ids, turns=2, **options)
    got, _ = answers(llama, long_ids, turns=2, ahead=True, **options)
    assert_same(got, want)
    copied = [counters.prefetched_bytes for _, _, counters in got]
    if name == "everything fits":
        assert copied == [0, 0]
    elif name == "reuse":
        assert copied == [counters.prefetched_bytes for _, _, counters in want]
    else:
        assert min(copied) > 0
        assert all(counters.prefetched_bytes == 0 for _, _, counters in want)
        waited = [counters.missed_bytes for _, _, counters in got]
        assert sum(waited) < sum(counters.missed_bytes for _, _, counters in want)


def test_evidence_is_the_same_to_the_bit(llama, long_ids, answers_without):
    want, recorded = answers_without(llama, long_ids, looks=True, **RANKED)
    got, also = answers(llama, long_ids, looks=True, ahead=True, **RANKED)
    assert_same(got, want)
    assert got[0][2].prefetched_bytes > 0
    for one, other in zip(recorded, also, strict=True):
        assert torch.equal(torch.stack(one.steps), torch.stack(other.steps))
        assert all(step.sum() > 0 for step in one.steps)


@pytest.mark.parametrize("kind", sorted(FORESEEING))
def test_the_query_is_that_of_the_family(kind, long_ids, monkeypatch):
    """Applied to a layer's own input, what predicts its query gives it: projection, norms, gates and rotation."""
    from tieredkv.cache.layer import TieredLayer

    model, found, wanted = random_text_model(kind), {}, {}
    decoder = families.find_decoder(kind)
    layers, kinds = model.get_decoder().layers, decoder.layer_types(model.config)
    tiered = [place for place, own in enumerate(kinds) if own == families.TIERED]
    attend = TieredLayer.attend

    def watched(layer, query, *args, **kwargs):
        wanted[layer.index] = query[:, -1].float()
        return attend(layer, query, *args, **kwargs)

    def enters(index):
        def hook(layer, inputs, named):
            hidden = (inputs[0] if inputs else named["hidden_states"])[0, -1:]
            query = decoder.query(layer.self_attn, getattr(layer, decoder.attention_norm)(hidden))
            rotation = [part[:, -1:] for part in named["position_embeddings"]]
            found[index] = sight.rotation_of(decoder, rotation)(query)[0].float()

        return hook

    monkeypatch.setattr(TieredLayer, "attend", watched)
    hooks = [
        layers[place].register_forward_pre_hook(enters(index), with_kwargs=True) for index, place in enumerate(tiered)
    ]
    with torch.no_grad(), tieredkv.use_attention(model), TieredCache(model.config, gpu_kv_gb=1) as cache:
        model(long_ids[:, :60], **cache_argument(cache))
    for hook in hooks:
        hook.remove()
    assert found.keys() == wanted.keys()
    assert found
    for index, query in wanted.items():
        torch.testing.assert_close(found[index], query, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "gemma3_text", "lfm2", "gemma4_text", "phi3"])
def test_other_kinds_of_layers(kind, long_ids):
    """Predicted from layers that do not grow; not at all where a decoder does not state what its query is made of."""
    model = random_text_model(kind)
    want, _ = answers(model, long_ids, ahead=False, **RANKED)
    got, _ = answers(model, long_ids, ahead=True, **RANKED)
    assert_same(got, want)
    assert (got[0][2].prefetched_bytes > 0) == (families.find_decoder(kind).mlp_norm is not None)


def test_several_forced_tokens_and_single_ones(llama, long_ids):
    """Tokens decoded in one call are not predicted; the next single one is."""
    found = []
    for ahead in (False, True):
        tiers = {**pressed(llama, 600, 0.5), "chunk_tokens": 8, "text_window": 16, "ahead": ahead, **RANKED}
        with (
            torch.no_grad(),
            tieredkv.use_attention(llama),
            TieredCache(llama.config, **tier_options(**tiers), copies=LateCopies()) as cache,
        ):
            llama(long_ids[:, :500], **cache_argument(cache))
            cache.seal()
            with cache.forced():
                parts = [long_ids[:, 40:43], long_ids[:, 50:51], long_ids[:, 60:64], long_ids[:, 70:71]]
                found.append(torch.cat([llama(part, **cache_argument(cache)).logits[0] for part in parts]))
            assert (cache.counters.prefetched_bytes > 0) == ahead
    assert torch.equal(*found)


@pytest.mark.parametrize("mode", [torch.inference_mode, partial(torch.autocast, "cpu", dtype=torch.bfloat16)])
def test_predictions_run_as_the_model_does(llama, long_ids, answers_without, mode):
    """On their own thread, too, which inherits neither autocast nor inference mode."""
    with mode():
        want, _ = answers_without(llama, long_ids, **RANKED)
        got, _ = answers(llama, long_ids, ahead=True, **RANKED, copies=ThreadCopies())
    assert_same(got, want)
    assert got[0][2].prefetched_bytes > 0


def test_after_an_interrupted_step_the_cache_goes_on(llama, long_ids, monkeypatch):
    """A copy that nobody waited for is over when the cache has gone back."""
    want, _ = answers(llama, long_ids, ahead=False, **RANKED)
    tiers = {**pressed(llama, 600, 0.5), "chunk_tokens": 8, "text_window": 16, "ahead": True, **RANKED}
    with (
        torch.no_grad(),
        tieredkv.use_attention(llama),
        TieredCache(llama.config, **tier_options(**tiers), copies=LateCopies()) as cache,
    ):
        cache.expect(CONTEXT)
        for part in long_ids[:, :500].split(170, dim=1):
            llama(part, **cache_argument(cache))
        cache.settle()
        for interrupted in (True, False):
            cache.expect(Question(max_new_tokens=8))
            llama(long_ids[:, 500:540], **cache_argument(cache))
            cache.seal()
            if interrupted:
                mlp = llama.model.layers[1].mlp
                with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                    patch.setattr(mlp, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
                    llama(long_ids[:, :1], **cache_argument(cache))
                assert cache.device_tier.copies.outstanding
            else:
                steps = [llama(long_ids[:, i : i + 1], **cache_argument(cache)).logits for i in range(6)]
                assert torch.equal(torch.cat(steps), want[0][0])
            cache.truncate(500)


def test_nothing_is_left_on_the_model(llama):
    def hooks():
        return [len(module._forward_pre_hooks) for module in llama.modules()]

    before = hooks()
    with tieredkv.use_attention(llama):
        within = hooks()
        with tieredkv.use_attention(llama):
            assert hooks() == within
        assert within != before
    assert hooks() == before


def test_no_memory_is_kept_for_a_cache_that_nobody_has(llama, long_ids):
    """Inside the block, too, where the hooks are."""
    with torch.no_grad(), tieredkv.use_attention(llama):
        cache = TieredCache(llama.config, gpu_kv_gb=1)
        llama(long_ids[:, :60], **cache_argument(cache))
        host = weakref.ref(cache.tiered_layers[0].host)
        del cache
        gc.collect()
        assert host() is None


def test_weights_that_are_buffers(long_ids):
    """As AWQ and GPTQ keep all weights of an attention without biases and norms."""
    model = random_text_model("llama")
    want, _, copied = decoded(model, long_ids, 4, ahead=True)
    for layer in model.model.layers:
        for linear in layer.self_attn.children():
            weight = linear.weight.detach()
            del linear.weight
            linear.register_buffer("weight", weight)
    assert not list(model.model.layers[1].self_attn.parameters())
    got, _, also = decoded(model, long_ids, 4, ahead=True)
    assert torch.equal(got, want)
    assert also == copied > 0


def test_rotations_are_moved_to_the_device_of_the_layer():
    """With a model on several cards, they come from the first; each layer moves them, after its hooks have run."""
    watch, cpu, moved = sight.Watch(random_text_model("llama")), torch.device("cpu"), []

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda:1")

        def to(self, device):
            moved.append(device)
            return torch.zeros(1, 1, 8, dtype=torch.float32, device=device)

    given = {"position_embeddings": tuple(torch.zeros(1, 1, 8).as_subclass(Elsewhere) for _ in range(2))}
    for first in (True, False, False):
        watch._entering(first=first, rotates=True)(None, (), given)
        assert all(part.device == cpu for part in watch._rotation(cpu))
    assert moved == [cpu, cpu], "once in a call"
