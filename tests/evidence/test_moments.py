"""Evidence: moments from recorded attention, and the recording itself, which changes no answer."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from films import with_sound
from helpers import RecordLogits, assert_near, cap_share, pressed, tier_options

import tieredkv
from tieredkv import TieredCache
from tieredkv.cache.looks import Looks
from tieredkv.cache.question import Question
from tieredkv.cache.retrieval import Retrieval
from tieredkv.cache.sealed_layer import SealedLayer
from tieredkv.environment.versions import cache_argument
from tieredkv.errors import OptionError
from tieredkv.evidence.moments import FAINT, LONGEST_S, MOST, Shown, by_step, collect, find_moments, step_of
from tieredkv.memory import ledger
from tieredkv.models.families.base import VideoGrid
from tieredkv.tiny import model as tiny
from tieredkv.tiny.evaluate import TOKENS_PER_SECOND
from tieredkv.tiny.scene import make_scene, questions
from tieredkv.tiny.video import write_video

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import evidence as benchmark

GRID = VideoGrid(steps=40, rows=1, columns=4, seconds_per_step=0.5)


def heat(**steps: float) -> torch.Tensor:
    """40 steps, of which those named (`s7=1.0`) are warm."""
    values = torch.zeros(40)
    for name, value in steps.items():
        values[int(name[1:])] = value
    return values


def moments(values: torch.Tensor, start: float = 0.0, length: float = 20.0):
    return find_moments(values, start, start + length, 0.5)


# ---- tokens and steps


def test_visual_tokens_belong_to_a_step_and_text_to_none():
    assert step_of(torch.tensor([0, 4, 5, 8, 9, 164, 165, 400]), 5, GRID).tolist() == [-1, -1, 0, 0, 1, 39, -1, -1]


def test_a_chunk_counts_for_the_steps_of_its_tokens_and_not_for_text():
    mass = torch.zeros((1, 25))
    mass[0, 1] = 8.0  # tokens 8 to 15: with a head of 10, two of text, all of step 0, half of step 1
    assert by_step(mass, 0, 8, 10, GRID)[0, :3].tolist() == [4.0, 2.0, 0.0]
    assert torch.equal(by_step(mass[:, 1:], 1, 8, 10, GRID), by_step(mass, 0, 8, 10, GRID))


# ---- moments


def test_moments_are_ranked_by_weight_with_times_in_seconds_of_the_file():
    first, second = moments(heat(s4=0.5, s5=0.5, s20=0.8, s39=0.02), start=100)
    assert (first.start, first.end, first.peak) == (102.0, 103.0, 102.25)
    assert (second.start, second.end, second.peak) == (110.0, 110.5, 110.25)
    assert first.weight == pytest.approx(1.0 / 1.82)


def test_a_moment_is_short_however_long_attention_stays():
    found = moments(torch.ones(40))
    assert all(moment.end - moment.start <= LONGEST_S for moment in found)
    edges = sorted((moment.start, moment.end) for moment in found)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(edges))


def test_a_step_longer_than_the_longest_moment_is_a_moment():
    (found,) = find_moments(torch.tensor([0.0, 1.0, 0.0]), 0.0, 180.0, 60.0)
    assert (found.start, found.end) == (60.0, 120.0)


def test_the_slope_of_a_peak_is_not_a_moment():
    slope = {f"s{20 + i}": 0.4 - 0.05 * i for i in range(6)}
    (found,) = moments(heat(s19=1.0, **slope))
    assert (found.start, found.end) == (9.5, 10.0)
    assert len(moments(heat(s19=1.0, s22=0.4, **{"s20": 0.4, "s21": 0.1}))) == 2


def test_faint_peaks_are_ignored_and_the_number_of_moments_is_limited():
    assert len(moments(heat(s4=1.0, s20=FAINT * 0.9))) == 1
    assert len(moments(torch.ones(40).index_fill_(0, torch.arange(0, 40, 2), 0.01), length=20.0)) == MOST
    assert moments(torch.zeros(40)) == ()


def test_a_peak_is_the_time_of_its_frame_if_a_step_is_one_frame():
    (found,) = find_moments(torch.tensor([0.0, 0.0, 0.0, 1.0]), 0.0, 180.0, 50.0, frames_per_step=1)
    assert (found.start, found.end, found.peak) == (150.0, 180.0, 150.0)


def test_a_last_step_that_is_cut_short_ends_with_the_video():
    (found,) = moments(heat(s39=1.0), start=3.0, length=19.75)
    assert (found.start, found.end, found.peak) == (22.5, 22.75, 22.5)


def looks_of(question: torch.Tensor, steps: list[torch.Tensor]) -> Looks:
    """Rows over chunks of one step each, after a head of one chunk."""
    looks = Looks(4)
    looks.question, looks.steps = question, steps
    looks.begin_answer(0, 2)
    return looks


def evidence_of(looks: Looks, tokens: int):
    return collect(looks, 9, 2, [Shown(4, GRID, (0.0, 20.0))], tokens, True)


def row(*places: int) -> torch.Tensor:
    """Attention over 41 chunks: the head's and one of each step."""
    attention = torch.full((41,), 0.01)
    attention[[place + 1 for place in places]] = 1.0
    return attention


def test_attention_common_to_all_rows_of_the_question_is_not_evidence():
    evidence = evidence_of(looks_of(torch.stack([row(30), row(30, 12), row(30)]), [row(30), row(30, 25)]), 2)
    assert sorted(moment.start for moment in evidence) == [6.0, 12.5]
    assert float(evidence.heat.sum()) == pytest.approx(1)


def test_a_token_has_the_evidence_of_the_row_that_predicted_it():
    evidence = evidence_of(looks_of(torch.stack([row(), row(3), row()]), [row(8), row(20)]), 2)
    assert [[moment.start for moment in token] for token in evidence.tokens] == [[1.5], [4.0]]


def test_rows_before_the_question_are_left_out():
    question = torch.stack([row(9), row(), row(3)])
    evidence = collect(looks_of(question, []), 2, 2, [Shown(4, GRID, (0.0, 20.0))], 1, False)
    assert [moment.start for moment in evidence] == [1.5]
    assert evidence.tokens is None


# ---- recording


def test_rows_are_added_up_over_layers_whatever_blocks_they_come_in():
    torch.manual_seed(0)
    weights, whole, cut = torch.rand(2, 3, 5, 30), Looks(8), Looks(8)
    whole.add_rows(0, weights, 30)
    for first, stop in ((0, 13), (13, 16), (16, 30)):
        cut.add_rows(first, weights[..., first:stop], 30)
    assert_near(cut.question, whole.question)
    assert whole.question.shape == (5, 4)
    assert_near(whole.question.sum(1), weights.sum((0, 1, 3)))


@pytest.fixture
def opened(video_model, processor, frames):
    sessions = []

    def open_one(share=0.6, video=frames, **options):
        cap = cap_share(video_model, 2 * len(frames) + 40, share)
        settings = {"recent_window": 16, "theta": 0.4, **options}
        session = tieredkv.open_session(
            video_model, video, gpu_kv_gb=cap, processor=processor, fps=4, **tier_options(**settings)
        )
        sessions.append(session)
        return session

    yield open_one
    for session in sessions:
        session.close()


QUESTION = "what colour was the star ?"
SETTINGS = [
    {},
    {"share": 3.0},
    {"policy": "arkvale"},
    {"theta": 2.0, "reuse_above": 0.5},
    {"theta": 0.0},
    {"theta": 2.0, "adaptive": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_recording_changes_no_logit_and_stays_under_the_cap(opened, settings, monkeypatch):
    session, used = opened(**settings), []
    reserve = ledger.DeviceLedger.reserve

    def watched(self, purpose, nbytes):
        reserve(self, purpose, nbytes)
        used.append(self.used_bytes)

    monkeypatch.setattr(ledger.DeviceLedger, "reserve", watched)
    session.ask(QUESTION, max_new_tokens=1)  # the first question may read the past in other blocks than later ones
    seen = []
    for evidence in (False, True, "tokens"):
        record = RecordLogits()
        answer = session.ask(QUESTION, max_new_tokens=6, logits_processor=[record], evidence=evidence)
        seen.append(torch.cat(record.seen))
        assert (answer.evidence is None) == (evidence is False)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert max(used) <= session.tiers.cap_bytes
    assert len(answer.evidence.tokens) == len(answer.token_ids)
    assert session._cached.cache.ledger.by_purpose() == {}


@pytest.mark.parametrize("share", [0.6, 3.0])
def test_steps_pay_at_most_all_of_their_attention(opened, monkeypatch, share):
    """If everything is attended to, what is recorded, sinks and text add up to all of it."""
    kept = []
    monkeypatch.setattr("tieredkv.evidence.moments.collect", lambda looks, *rest: kept.append(looks))
    session = opened(share=share, theta=2.0, sink_tokens=0)
    session.ask(QUESTION, max_new_tokens=6)
    (looks,) = kept
    shares = torch.stack(looks.steps).sum(1) / looks.heads
    assert len(shares) == 5
    assert bool((shares > 0.05).all())
    assert bool((shares < 1).all())


@pytest.mark.parametrize("ranked", [True, False])
def test_what_is_recorded_is_the_attention_to_each_chunk(llama, long_ids, monkeypatch, ranked):
    """Of every step and layer, computed anew from the keys in the host tier."""
    lse, compared, step, record = [], [], SealedLayer.step, Retrieval.record_step

    def with_lse(self, of_heads):
        lse.append(of_heads)
        record(self, of_heads)

    def watched(self, query, key, value, scaling, *rest):
        before = self.phase.chunk_mass.clone()
        out = step(self, query, key, value, scaling, *rest)
        layout, heads = self.phase.plan.layout, self.dynamic
        keys, _ = self.pages.host.decoded(layout.sink_chunks * 8, layout.old_chunks * 8)
        logits = query.unflatten(0, (len(keys), -1)) @ keys.mT * scaling
        mass = (logits - lse.pop().unsqueeze(-1)).exp().sum(1).unflatten(-1, (-1, 8)).sum(-1)
        chosen = self.retrieval.residency.chosen
        assert bool(chosen.all()) != ranked
        compared.append((self.phase.chunk_mass - before, (mass[heads] * chosen).sum(0)))
        return out

    monkeypatch.setattr(Retrieval, "record_step", with_lse)
    monkeypatch.setattr(SealedLayer, "step", watched)
    room = pressed(llama, 300, 0.5) if ranked else {"gpu_kv_gb": 1.0}
    options = {**room, "theta": 2.0, "text_window": 16, "chunk_tokens": 8, "host_kv_bits": 16, "pack_pages": False}
    made = TieredCache(llama.config, **tier_options(**options))
    with tieredkv.use_attention(llama), torch.no_grad(), made as cache:
        cache.expect(Question(max_new_tokens=4, looks=Looks(8)))
        llama(long_ids[:, :300], **cache_argument(cache))
        for token in (3, 5):
            llama(torch.tensor([[token]]), **cache_argument(cache))
    assert len(compared) == 2 * llama.config.num_hidden_layers
    for got, want in compared:
        assert float(want.sum()) > 0.1
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.interpreter
def test_kernels_record_what_torch_records(llama, long_ids, kernels):
    recorded = []
    for ops in (None, kernels):
        options = {**pressed(llama, 300, 0.5), "theta": 2.0, "text_window": 16}
        with (
            tieredkv.use_attention(llama),
            torch.no_grad(),
            TieredCache(llama.config, **tier_options(**options), ops=ops) as cache,
        ):
            cache.expect(Question(max_new_tokens=4, looks=Looks(8)))
            llama(long_ids[:, :300], **cache_argument(cache))
            for token in (3, 5):
                llama(torch.tensor([[token]]), **cache_argument(cache))
            recorded.append(cache.tiered_layers[0].sealed.phase.chunk_mass.clone())
    assert float(recorded[0].sum()) > 0
    assert_near(recorded[1], recorded[0])


def test_times_are_those_of_the_file_and_survive_a_save(opened, video_model, processor, tmp_path):
    session = opened(start=10.0)
    answer = session.ask(QUESTION, max_new_tokens=3)
    assert (answer.evidence.start, answer.evidence.end) == (10.0, 30.0)
    assert all(10.0 <= moment.start < moment.peak < moment.end <= 30.0 for moment in answer.evidence)
    session.save(tmp_path / "kept.tkv")
    with tieredkv.load_session(tmp_path / "kept.tkv", video_model, processor=processor) as again:
        loaded = again.ask(QUESTION, max_new_tokens=3).evidence
    assert loaded.start == 10.0
    assert_near(loaded.heat, session.ask(QUESTION, max_new_tokens=3).evidence.heat)


def test_times_are_on_the_files_clock_if_the_picture_begins_after_the_sound(video_model, processor, frames, tmp_path):
    """As players show them; a saved session keeps them."""
    film = with_sound(tmp_path / "late.mp4", frames[:40], begin=5)
    settings = {"gpu_kv_gb": 1, "processor": processor}
    with tieredkv.open_session(video_model, film, fps=4, **settings) as session:
        evidence = session.ask(QUESTION, max_new_tokens=2).evidence
        session.save(tmp_path / "late.tkv")
    assert (evidence.start, evidence.end) == pytest.approx((5.0, 15.0), abs=0.1)
    assert all(evidence.start <= moment.start <= moment.peak <= moment.end <= evidence.end for moment in evidence)
    with tieredkv.load_session(tmp_path / "late.tkv", video_model, processor=processor) as again:
        assert again.ask(QUESTION, max_new_tokens=2).evidence.start == evidence.start


def test_a_turn_of_a_conversation_has_the_rows_of_its_own_question(opened, monkeypatch):
    rows = []
    monkeypatch.setattr("tieredkv.evidence.moments.collect", lambda looks, own, *rest: rows.append(own))
    session = opened()
    session.ask(QUESTION, max_new_tokens=2)
    for _ in range(2):
        session.chat(QUESTION, max_new_tokens=2)
    assert rows == [rows[0]] * 3
    assert rows[0] >= len(QUESTION.split())
    session.ask("assistant", max_new_tokens=2)  # a word that also follows every question
    assert rows[-1] == rows[0] - session.template.tokenize(QUESTION).shape[1] + 1


def test_evidence_of_another_kind_is_refused(opened, video_model, processor, frames):
    with pytest.raises(OptionError, match="evidence='all' is not valid: give True, False or 'tokens'"):
        opened().ask(QUESTION, evidence="all")
    answer = tieredkv.generate(
        video_model, frames, QUESTION, 1, processor=processor, fps=4, max_new_tokens=2, evidence=False
    )
    assert answer.evidence is None


# ---- accuracy


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize(("share", "seconds"), [(0.1, 510), (2.0, 255)])
def test_the_card_that_an_answer_is_about_is_among_the_best_three_moments(tmp_path, share, seconds):
    """Correctly answered questions about an unseen video, counted as in `benchmarks/evidence.py`: for nine in ten, the
    last card looked up is among the best three moments of the token that named its letter or colour. Three moments are
    at most 12 s of the video's 510, or 255."""
    seed = 1_000_420
    scene = make_scene(seed, seconds, 12)
    model, processor = tiny.load()
    cap = cap_share(model, seconds * TOKENS_PER_SECOND, share)
    path = write_video(scene, tmp_path / "scene.mp4")
    with tieredkv.open_session(model, path, gpu_kv_gb=cap, processor=processor, fps=tiny.FPS) as session:
        counted = benchmark.judge(session, questions(scene, seed, 12))
    assert len(counted["last"]) >= 8
    for name, least in {"last": 0.9, "looked_up": 0.9, "answer": 0.9, "chain": 0.85}.items():
        assert sum(counted[name]) >= least * len(counted[name]), name
    assert counted["chain"]


def test_a_benchmark_that_counts_hits_counts_misses():
    best = moments(heat(s4=1.0))
    assert benchmark.hits(best, (1.0, 2.1))
    assert not benchmark.hits(best, (2.5, 9.0))
    assert not benchmark.hits((), (0.0, 20.0))


def test_evidence_ends_with_the_film_if_frames_are_far_apart(video_model, processor, frames):
    with tieredkv.open_session(
        video_model, frames, gpu_kv_gb=1, processor=processor, fps=0.1, source_fps=120 / 41
    ) as session:
        evidence = session.ask(QUESTION, max_new_tokens=2).evidence
    assert evidence.end == pytest.approx(41)
    assert all(moment.peak < 41 for moment in evidence)
