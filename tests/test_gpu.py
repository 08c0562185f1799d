"""What only a card can show: make test-gpu. Skipped where there is none."""

from __future__ import annotations

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_near, cap_share, pressed, tier_options
from transformers import DynamicCache

import tieredkv
from tieredkv import TieredCache
from tieredkv.codecs import codec_for
from tieredkv.environment.versions import cache_argument
from tieredkv.memory.copies import StreamCopies
from tieredkv.memory.pagelock import PageLocker, aligned
from tieredkv.memory.units import GIB
from tieredkv.ops.base import Pages
from tieredkv.session.step_graph import StepGraph

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
SMALL = {"chunk_tokens": 8, "text_window": 16, "host_kv_bits": 16}
PACKED = [{"host_kv_bits": 8}, {"host_kv_bits": 4}]
POLICIES = [
    {"pack_pages": False},
    {"theta": 2.0},
    {"policy": "streaming"},
    {"policy": "arkvale"},
    {"policy": "snapkv"},
    {"reuse_above": 0.5, "prefetch": True},
    {"adaptive": True},
]


@pytest.fixture(scope="module")
def card() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def on_card(llama, card):
    """The tiny model on the card, in float32 without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return copy.deepcopy(llama).to(card)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_budget_equals_stock_transformers(on_card, long_ids, card, dtype):
    model, ids = on_card.to(dtype), long_ids.to(card)

    def logits(cache):
        """Logits of a prompt and of the same next tokens in every run."""
        calls = [ids[:, :890], *ids[:, 890:].split(1, dim=1)]
        return torch.stack([model(call, **cache_argument(cache)).logits[0, -1].float() for call in calls])

    with torch.no_grad():
        stock = logits(DynamicCache(config=model.config))
        with tieredkv.use_attention(model), TieredCache(model.config, **tier_options(gpu_kv_gb=1, **SMALL)) as cache:
            tiered = logits(cache)
    if dtype == torch.float32:
        assert_near(tiered, stock)
    else:  # whose roundings add up over the layers
        torch.testing.assert_close(tiered, stock, rtol=0, atol=0.05 * float(stock.abs().max()))


# Sketches of chunks in few bits may rank chunks otherwise after a tiny difference: with these, no chunks are ranked.
@pytest.mark.parametrize(
    "options", POLICIES + [{**packed, "gpu_kv_gb": 1.0, "budget_ratio": None} for packed in PACKED], ids=str
)
def test_a_card_decodes_as_the_cpu_does(llama, on_card, long_ids, card, options):
    """Prefill in calls, a cap below the full cache, several steps: logits, and what was selected and copied."""
    tiers = {**pressed(llama, 900, 0.6), **SMALL, **options}

    def decode(model, ids):
        with (
            torch.no_grad(),
            tieredkv.use_attention(model),
            TieredCache(model.config, **tier_options(**tiers), max_new_tokens=8, prompt_tokens=900) as cache,
        ):
            for part in ids.split(256, dim=1):
                model(part, **cache_argument(cache))
            rows = [model(ids[:, i : i + 1], **cache_argument(cache)).logits[0, -1] for i in range(6)]
            cache.finish()
            counters = cache.counters
            return torch.stack(rows).cpu(), (counters.selected, counters.missed_bytes)

    (want, want_counts), (got, counts) = decode(llama, long_ids), decode(on_card, long_ids.to(card))
    near = 3e-2 if tiers.get("pack_pages", True) else 5e-3  # a tiny difference may round a number the other way
    torch.testing.assert_close(got, want, atol=near, rtol=0)
    assert counts[0] == want_counts[0]
    assert counts[1] == pytest.approx(want_counts[1], rel=0.1)  # near ties of ranks may be decided differently


def decode_by_steps(model, ids, card, captured: bool, **options):
    tiers = {**pressed(model, 900, 0.6), **SMALL, **options}
    made = TieredCache(model.config, **tier_options(**tiers), max_new_tokens=12)
    with torch.no_grad(), tieredkv.use_attention(model), made as cache:
        model(ids, **cache_argument(cache))
        cache.seal()

        def forward(token, place):
            return model(token, **cache_argument(cache), position_ids=place).logits[:, -1]

        steps = StepGraph(forward, cache, card, axes=1, position=900)
        if not captured:
            steps.path = "eager: asked for"
        rows = [steps(7 + i).clone() for i in range(10)]
        cache.finish()
        length, counters = cache.get_seq_length(), cache.counters
        return torch.cat(rows), steps.path, (length, counters.selected, counters.missed_bytes, counters.unseen_mass)


@pytest.mark.parametrize("options", POLICIES + PACKED, ids=str)
def test_a_replayed_graph_gives_what_eager_steps_give(on_card, long_ids, card, options):
    eager, _, want = decode_by_steps(on_card, long_ids.to(card), card, captured=False, **options)
    graph, path, got = decode_by_steps(on_card, long_ids.to(card), card, captured=True, **options)
    assert path == "graph"
    assert_near(graph, eager)
    assert got == pytest.approx(want)


def test_no_step_waits_for_the_host(on_card, long_ids, card):
    ids = long_ids.to(card)
    made = TieredCache(on_card.config, **tier_options(**pressed(on_card, 900, 0.6), **SMALL), max_new_tokens=8)
    token, place = torch.full((1, 1), 7, device=card), torch.full((1, 1), 900, device=card)
    with torch.no_grad(), tieredkv.use_attention(on_card), made as cache:
        on_card(ids, **cache_argument(cache))
        on_card(token, **cache_argument(cache), position_ids=place)
        torch.cuda.set_sync_debug_mode("error")
        try:
            on_card(token, **cache_argument(cache), position_ids=place + 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_nothing_is_read_before_it_has_arrived(card):
    """A copy delayed by a tenth of a second, between writing its source and reading its target."""
    copies, source, target = StreamCopies(), torch.zeros(1000, device=card), torch.zeros(1000, device=card)

    def late():
        torch.cuda._sleep(200_000_000)
        target.copy_(source)
        return 4000

    for value in range(1, 4):
        source.fill_(value)  # after the copy before: it still reads
        copies.submit("one", late)
        assert copies.wait("one") == 4000
        assert float(target.sum()) == 1000 * value
    copies.close()


def test_registered_memory_is_read_by_the_card_and_given_back(card, kernels):
    codec, locker = codec_for(4, 8, 16, torch.float32), PageLocker()
    arena = aligned((2, 5, codec.chunk_bytes), torch.uint8)
    locker.use(card)
    heads, chunks, slots = torch.tensor([0, 1]), torch.tensor([3, 4]), torch.tensor([1, 0], device=card)
    for _ in range(2):
        arena.random_()
        locker.lock(arena)
        assert locker.refusal() is None
        pages = Pages(codec, torch.zeros(2, codec.chunk_bytes, dtype=torch.uint8, device=card), None)
        kernels.fetch(SimpleNamespace(codec=codec, records=arena), pages, heads, chunks, slots)
        assert torch.equal(pages.records[1].cpu(), arena[0, 3])
        locker.unlock(arena)
    locker.close()


def test_memory_that_cannot_be_locked_is_copied_through_the_host(on_card, long_ids, card, monkeypatch):
    monkeypatch.setattr(PageLocker, "refusal", lambda self: "as a test wants it")
    with pytest.warns(UserWarning, match="could not be page-locked"):
        got, path, _ = decode_by_steps(on_card, long_ids.to(card), card, captured=True)
    monkeypatch.undo()
    want, _, _ = decode_by_steps(on_card, long_ids.to(card), card, captured=False)
    assert path == "eager: operations by triton, copies by torch"
    assert_near(got, want)


def test_memory_for_keys_and_values_stays_below_the_cap(card):
    """The allocator's own peak over prefill and decoding, less the weights and what a call of that length takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=256, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.device(card):
        model = LlamaForCausalLM(config).bfloat16().eval()
    ids, cap = torch.randint(64, (1, 16384), device=card), 0.05

    def peak(work) -> int:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def answer() -> None:
        made = TieredCache(model.config, gpu_kv_gb=cap, prompt_tokens=16384, max_new_tokens=8)
        with tieredkv.use_attention(model), made as cache:
            for part in ids.split(1024, dim=1):
                model(part, **cache_argument(cache), logits_to_keep=1)
            for i in range(6):
                model(ids[:, i : i + 1], **cache_argument(cache))

    with torch.no_grad():
        answer()  # so that kernels are compiled and libraries have their workspaces
        activations = peak(lambda: model(ids[:, :1024], use_cache=False, logits_to_keep=1))
        assert peak(answer) <= cap * GIB + 2 * activations
    full = 16384 * 8 * 2 * 512 * 2
    assert cap * GIB < full / 4


def test_a_session_on_a_card_answers_as_on_the_cpu(video_model, processor, frames, card, tmp_path):
    def answer(model):
        options = {**pressed(model, 280, 0.6), "processor": processor, "fps": 4, **SMALL}
        with tieredkv.open_session(model, frames, **tier_options(**options)) as session:
            session.save(tmp_path / "saved")
            one = session.ask("what colour was the star ?", max_new_tokens=8)
        with tieredkv.load_session(tmp_path / "saved", model, processor=processor) as session:
            return one, session.ask("what colour was the star ?", max_new_tokens=8)

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    want, _ = answer(video_model)
    one, again = answer(copy.deepcopy(video_model).to(card))
    assert one.token_ids == want.token_ids == again.token_ids
    assert one.stats.decode_path == "graph"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("options", [{}, {"theta": 2.0}], ids=str)
def test_a_model_over_two_cards_decodes_as_on_one(llama, on_card, long_ids, card, options):
    from accelerate import dispatch_model

    tiers = {"gpu_kv_gb": cap_share(llama, 900, 0.6), **SMALL, **options, "budget_ratio": 0.3}
    where: dict[str, int] = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}
    where |= {f"model.layers.{index}": int(index > 0) for index in range(3)}
    # As `from_pretrained(device_map="auto")` does it.
    spread = dispatch_model(copy.deepcopy(llama), where, skip_keys=llama._skip_keys_device_placement)
    found = []
    for model in (on_card, spread):
        with (
            torch.no_grad(),
            tieredkv.use_attention(model),
            TieredCache(model.config, **tier_options(**tiers), max_new_tokens=8, prompt_tokens=900) as cache,
        ):
            ids = long_ids.to(card)
            model(ids, **cache_argument(cache))
            found.append(
                torch.stack([model(ids[:, i : i + 1], **cache_argument(cache)).logits[0, -1] for i in range(6)])
            )
            places = [layer.sealed.phase.pool.records.device for layer in cache.tiered_layers]
    assert [place.index for place in places] == [0, 1, 1]
    assert_near(found[1].cpu(), found[0].cpu())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_session_over_two_cards_answers_as_on_one(video_model, processor, frames, card):
    from accelerate import dispatch_model

    def answer(model):
        options = {"gpu_kv_gb": cap_share(video_model, 260, 0.9), "chunk_tokens": 8, "text_window": 8, "theta": 2.0}
        with tieredkv.open_session(
            model, frames, processor=processor, fps=4, **tier_options(**options), budget_ratio=0.3
        ) as session:
            return session.ask("what colour was the star ?", max_new_tokens=6).token_ids

    layers = {f"model.language_model.layers.{index}": int(index > 1) for index in range(4)}
    rest = {"model.visual": 0, "model.language_model.embed_tokens": 0, "model.language_model.rotary_emb": 0}
    where = {**layers, **rest, "model.language_model.norm": 1, "lm_head": 1}
    spread = dispatch_model(copy.deepcopy(video_model), where, skip_keys=video_model._skip_keys_device_placement)
    assert answer(spread) == answer(copy.deepcopy(video_model).to(card))
