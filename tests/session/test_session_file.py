"""A session saved and loaded: the same answers, no video needed, and whatever does not match is refused."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from films import with_sound
from helpers import assert_near, pressed, session_logits, tier_options

import tieredkv
from tieredkv.api import new_session
from tieredkv.errors import BudgetError, OptionError, SessionError, TieredKVError
from tieredkv.models.families.qwen2_5_vl import Qwen25VL
from tieredkv.storage import tensor_file
from tieredkv.video.sampling import Sampling

STAR, MOON = "what colour was the star ?", "follow the moon for 4 ?"


@pytest.fixture
def options(video_model, processor):
    return {
        **pressed(video_model, 280, 0.6),
        "processor": processor,
        "fps": 4,
        "chunk_tokens": 8,
        "recent_window": 16,
        "theta": 0.4,
    }


@pytest.fixture
def kept(video_model, frames, options, tmp_path):
    """A saved session, and the answers of the session it was saved from.

    That session has answered before: its first question still finds tokens on the device, and reads in other blocks.
    """
    path = tmp_path / "session.tkv"
    with tieredkv.open_session(video_model, frames, **tier_options(**options)) as session:
        session.save(path)
        session_logits(session, MOON, 2)
        answers = [session_logits(session, question, 6) for question in (STAR, MOON)]
    return path, answers


def load(path, video_model, processor, **options):
    return tieredkv.load_session(path, video_model, processor=processor, **options)


def test_a_loaded_session_answers_bit_for_bit_like_the_saved_one(kept, video_model, processor):
    path, answers = kept
    with load(path, video_model, processor) as session:
        for question, logits in zip((STAR, MOON), answers, strict=True):
            assert torch.equal(session_logits(session, question, 6), logits)
        assert session.ingest_stats.frames == 120


def test_loading_needs_no_video_and_prefills_none_of_it(kept, video_model, processor, monkeypatch):
    path, _ = kept

    def forbidden(*args, **options):
        raise AssertionError("the video was touched")

    decoded = []
    decode = Qwen25VL.decode
    monkeypatch.setattr("tieredkv.video.frames.open_video", forbidden)
    monkeypatch.setattr(Qwen25VL, "encode", forbidden)
    monkeypatch.setattr(
        Qwen25VL, "decode", lambda self, model, e, *rest: decoded.append(e.shape[1]) or decode(self, model, e, *rest)
    )
    with load(path, video_model, processor) as session:
        session.ask(STAR, max_new_tokens=4)
    assert sum(decoded) < 30


def test_a_session_saved_after_questions_contains_no_trace_of_them(video_model, frames, options, tmp_path):
    from tieredkv.storage import tensor_file

    with tieredkv.open_session(video_model, frames, **tier_options(**options)) as session:
        session.save(tmp_path / "before")
        session.ask(MOON, max_new_tokens=20)
        session.save(tmp_path / "after")
    before, after = tensor_file.read(tmp_path / "before"), tensor_file.read(tmp_path / "after")
    for name in before.names:
        assert torch.equal(before.tensor(name), after.tensor(name)), name


def test_what_corrects_predicted_queries_is_saved(video_model, frames, options, processor, tmp_path):
    """And is not fitted to questions, however long."""
    options |= {"ahead": True, "prefill_chunk": 140}
    with tieredkv.open_session(video_model, frames, **tier_options(**options)) as session:
        session.ask(STAR * 40, max_new_tokens=1)
        session.save(tmp_path / "session.tkv")
        wanted = [layer.correcting.state() for layer in session._cached.cache.tiered_layers]
    assert wanted[0] == {}
    assert all(wanted[1:])
    with load(tmp_path / "session.tkv", video_model, processor, ahead=True) as session:
        session.ask(STAR * 40, max_new_tokens=3)
        for layer, state in zip(session._cached.cache.tiered_layers, wanted, strict=True):
            found = layer.correcting.state()
            assert found.keys() == state.keys()
            assert all(torch.equal(found[name], state[name]) for name in state)
        assert session._cached.cache.counters.prefetched_bytes > 0


def test_nothing_is_fitted_to_questions_about_a_loaded_session(video_model, frames, options, processor, tmp_path):
    """One without corrections, as older versions have written it, however long the questions are."""
    with tieredkv.open_session(video_model, frames, **tier_options(**options)) as session:
        session.save(tmp_path / "session.tkv")
    before = tensor_file.read(tmp_path / "session.tkv").names
    with load(tmp_path / "session.tkv", video_model, processor, ahead=True) as session:
        session.ask(STAR * 40, max_new_tokens=1)
        session.save(tmp_path / "again.tkv")
    assert tensor_file.read(tmp_path / "again.tkv").names == before


def test_the_conversation_is_saved(kept, video_model, frames, options, processor, tmp_path):
    with tieredkv.open_session(video_model, frames, **tier_options(**options)) as session:
        session.chat(STAR, max_new_tokens=3)
        session.save(tmp_path / "talk")
        there = session.chat(MOON, max_new_tokens=5).token_ids
    with load(tmp_path / "talk", video_model, processor) as session:
        assert session.history[0][0] == STAR
        assert session.chat(MOON, max_new_tokens=5).token_ids == there


def test_a_loaded_session_can_be_saved_again(kept, video_model, processor, tmp_path):
    path, answers = kept
    with load(path, video_model, processor) as session:
        session.ask(STAR, max_new_tokens=2)
        session.save(path)  # onto the file it is mapped from
        assert torch.equal(session_logits(session, STAR, 6), answers[0])
    with load(path, video_model, processor) as session:
        assert torch.equal(session_logits(session, MOON, 6), answers[1])


def test_a_question_longer_than_the_room_kept_for_it_is_answered(kept, video_model, processor, frames, options):
    path, _ = kept
    question = " ".join([STAR] * 60)
    with tieredkv.open_session(video_model, frames, **tier_options(**{**options, "gpu_kv_gb": 1})) as session:
        expected = session_logits(session, question, 3)
    with load(path, video_model, processor, gpu_kv_gb=1) as session:
        assert_near(session_logits(session, question, 3), expected)


def test_tier_settings_can_be_changed_when_it_is_loaded(kept, video_model, processor, frames, options):
    path, _ = kept
    with tieredkv.open_session(
        video_model, frames, **tier_options(**{**options, "theta": 2.0, "gpu_kv_gb": 1})
    ) as session:
        expected = session_logits(session, STAR, 4)
    with load(path, video_model, processor, **tier_options(theta=2.0, gpu_kv_gb=1)) as session:
        assert_near(session_logits(session, STAR, 4), expected)


def test_stock_positions_stay_stock(video_model, frames, options, processor, tmp_path):
    with tieredkv.open_session(video_model, frames, positions="stock", **tier_options(**options)) as session:
        session.save(tmp_path / "stock")
        session_logits(session, MOON, 2)
        expected = session_logits(session, STAR, 4)
    with load(tmp_path / "stock", video_model, processor) as session:
        assert session.positions == "stock"
        assert torch.equal(session_logits(session, STAR, 4), expected)


def other_weights(model):
    import copy

    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight[3, 5] += 1e-3
    return other


def test_other_weights_are_refused(kept, video_model, processor):
    with pytest.raises(SessionError, match=r"saved with another model \(.*weights differ"):
        load(kept[0], other_weights(video_model), processor)


def test_other_frequencies_are_refused(kept, video_model, processor):
    import copy

    other = copy.deepcopy(video_model)
    other.model.language_model.rotary_emb.inv_freq /= 4
    with pytest.raises(SessionError, match=r"saved with another model \(the model's buffer .*inv_freq differs\)"):
        load(kept[0], other, processor)


def test_a_file_without_buffers_and_adapters_loads(video_model, processor, frames, options, tmp_path, monkeypatch):
    """The form of the first session files."""
    write = tensor_file.write

    def old(path, manifest, tensors, progress):
        return write(path, {name: part for name, part in manifest.items() if name != "model_state"}, tensors, progress)

    monkeypatch.setattr("tieredkv.session.session_file.tensor_file.write", old)
    with tieredkv.open_session(video_model, frames, **tier_options(**options)) as session:
        session.save(tmp_path / "old.tkv")
    load(tmp_path / "old.tkv", video_model, processor).close()
    with pytest.raises(SessionError, match="weights differ"):
        load(tmp_path / "old.tkv", other_weights(video_model), processor)


def test_a_model_that_is_cast_while_a_session_is_open_is_refused(video_model, processor, frames, options):
    import copy

    model = copy.deepcopy(video_model)
    with tieredkv.open_session(model, frames, **tier_options(**options)) as session:
        model.to(torch.bfloat16)
        with pytest.raises(SessionError, match=r'opened with another model \(dtype was "float32", is "bfloat16"\)'):
            session.ask(STAR, max_new_tokens=1)


def quantised(kind):
    """The random model, its decoder quantised by torchao."""
    import copy

    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

    def quantise(model):
        model = copy.deepcopy(model)
        tables = {"filter_fn": lambda module, name: isinstance(module, torch.nn.Embedding)} if "tables" in kind else {}
        config = quantization.IntxWeightOnlyConfig if tables else getattr(quantization, kind)
        quantization.quantize_(model, config(), **tables)
        return model

    return quantise


@pytest.mark.parametrize(
    "kind",
    ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig", "tables of embeddings"],
)
def test_a_quantised_model_is_planned_asked_saved_and_loaded(video_model, processor, frames, options, tmp_path, kind):
    model = quantised(kind)(video_model)
    with tieredkv.open_session(model, frames, **tier_options(**options)) as session:
        session.save(tmp_path / "s.tkv")
        session_logits(session, MOON, 2)
        expected = session_logits(session, STAR, 4)
    with load(tmp_path / "s.tkv", model, processor) as session:
        now = session_logits(session, STAR, 4)
        torch.testing.assert_close(now, expected, rtol=0, atol=0, equal_nan=True)  # eight bits of float can overflow
    with pytest.raises(SessionError, match="weights differ"):
        load(tmp_path / "s.tkv", video_model, processor)
    smaller, whole = (tieredkv.plan(each, 240, processor=processor) for each in (model, video_model))
    if "tables" not in kind:
        assert smaller.decoder_bytes < 0.5 * whole.decoder_bytes
    assert smaller.dtype == whole.dtype


def test_another_dtype_is_refused(kept, video_model, processor):
    import copy

    with pytest.raises(SessionError, match=r"another model \(dtype was \"float32\", is \"bfloat16\""):
        load(kept[0], copy.deepcopy(video_model).to(torch.bfloat16), processor)


def test_another_frame_size_is_refused_naming_the_setting(kept, video_model):
    from tieredkv.tiny.processor import build_processor

    larger = build_processor()
    larger.video_processor.size = {"shortest_edge": 112 * 112, "longest_edge": 112 * 112}
    with pytest.raises(SessionError, match=r"another processor \(video_processor\.size\.longest_edge was 3136"):
        load(kept[0], video_model, larger)


def test_another_chunk_size_is_refused(kept, video_model, processor):
    with pytest.raises(SessionError, match="saved in chunks of 8 tokens: chunk_tokens=16"):
        load(kept[0], video_model, processor, chunk_tokens=16)


def test_another_video_is_refused_and_the_same_is_accepted(kept, video_model, processor, frames):
    with pytest.raises(SessionError, match="was saved for another video"):
        load(kept[0], video_model, processor, video=frames[::-1])
    load(kept[0], video_model, processor, video=frames).close()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"gpu_kv_gb": 0}, BudgetError, "gpu_kv_gb=0 is not valid"),
        ({"thetta": 1}, OptionError, "thetta"),
        ({"max_new_tokens": 3}, OptionError, "generation option"),
        ({"fps": 2}, OptionError, "'fps' cannot be given: the video of a saved session"),
        ({"positions": "stock"}, OptionError, "'positions' cannot be given"),
    ],
)
def test_settings_that_do_not_exist_are_refused(kept, video_model, processor, given, error, message):
    with pytest.raises(error, match=message):
        load(kept[0], video_model, processor, **given)


def damaged(path, place: float) -> None:
    """Flip one bit, `place` of the way through the file."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("place", [0.1, 0.35, 0.62, 0.9])
def test_a_flipped_bit_is_found_before_it_is_attended_to(kept, video_model, processor, place):
    path, _ = kept
    damaged(path, place)
    try:
        session = load(path, video_model, processor)
    except SessionError:
        return  # in the header
    with session:
        for _ in range(2):
            with pytest.raises(SessionError, match=r"session\.tkv is damaged: 'layers\.\d+\.\w+' does not match"):
                session.ask(STAR, max_new_tokens=2)


def test_damage_is_not_saved_under_a_new_checksum(kept, video_model, processor, tmp_path):
    damaged(kept[0], 0.62)
    with load(kept[0], video_model, processor) as session, pytest.raises(SessionError, match="is damaged"):
        session.save(tmp_path / "copy.tkv")
    assert not (tmp_path / "copy.tkv").exists()


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(kept, video_model, processor, share):
    path = kept[0]
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(SessionError, match=r"session\.tkv"):
        load(path, video_model, processor)


def test_a_file_of_something_else_is_refused(video_model, processor, tmp_path):
    from tieredkv.storage import tensor_file

    tensor_file.write(tmp_path / "other", {"hello": 1}, {"a": torch.zeros(3)})
    with pytest.raises(SessionError, match="holds no session"):
        load(tmp_path / "other", video_model, processor)
    with pytest.raises(SessionError, match="no such file"):
        load(tmp_path / "gone", video_model, processor)


def test_a_session_without_a_video_or_closed_cannot_be_saved(video_model, processor, frames, options, tmp_path):
    session = new_session(video_model, gpu_kv_gb=1, processor=processor)
    with pytest.raises(TieredKVError, match="no video yet"):
        session.save(tmp_path / "x")
    session.close()
    with pytest.raises(TieredKVError, match="closed"):
        session.save(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_loaded_session_takes_no_second_video(kept, video_model, processor, frames):
    with load(kept[0], video_model, processor) as session, pytest.raises(TieredKVError, match="has its video already"):
        session.ingest(frames, Sampling(fps=4))


def test_closing_releases_the_mapped_file(kept, video_model, processor):
    session = load(kept[0], video_model, processor)
    mapped = weakref.ref(session._cached.cache.tiered_layers[0].host._arena)
    session.ask(STAR, max_new_tokens=2)
    session.close()
    gc.collect()
    assert mapped() is None


def test_a_session_of_a_file_is_recognised_by_its_content_not_its_name(video_model, processor, tmp_path):
    from tieredkv.tiny.scene import make_scene
    from tieredkv.tiny.video import write_video

    film = write_video(make_scene(5, 8, 2), tmp_path / "film.mp4")
    with tieredkv.open_session(video_model, film, gpu_kv_gb=1, processor=processor, fps=4) as session:
        session.save(tmp_path / "s")
    moved = film.rename(tmp_path / "moved.mp4")
    load(tmp_path / "s", video_model, processor, video=moved).close()
    write_video(make_scene(6, 8, 2), film)
    with pytest.raises(SessionError, match=r"another video \(.*film\.mp4, as it was then\) than .*film\.mp4"):
        load(tmp_path / "s", video_model, processor, video=film)


def test_arrays_that_hold_the_same_frames_are_the_same_video(kept, video_model, processor, frames):
    as_floats = np.asarray(frames, dtype=np.float64) / 255
    load(kept[0], video_model, processor, video=as_floats).close()


def test_a_long_question_asked_before_does_not_make_the_file_longer(video_model, frames, options, tmp_path):
    with tieredkv.open_session(video_model, frames, **tier_options(**{**options, "gpu_kv_gb": 1})) as session:
        before = session.save(tmp_path / "s")
        session.ask(" ".join([STAR] * 120), max_new_tokens=2)
        assert session.save(tmp_path / "s") == before


def test_a_host_cap_below_the_saved_cache_is_refused(kept, video_model, processor):
    with pytest.raises(BudgetError, match="host_kv_gb allows"):
        load(kept[0], video_model, processor, host_kv_gb=1e-6)


def test_what_a_later_version_adds_to_the_manifest_is_ignored(kept, video_model, processor, tmp_path):
    from tieredkv.storage import tensor_file

    stored = tensor_file.read(kept[0])
    manifest = stored.manifest
    for part in (
        manifest,
        manifest["tiers"],
        manifest["session"],
        *(manifest["session"][n] for n in ("grid", "ingest_stats")),
    ):
        part["added_later"] = 1
    tensor_file.write(tmp_path / "later", manifest, {name: stored.tensor(name) for name in stored.names})
    with load(tmp_path / "later", video_model, processor) as session:
        assert torch.equal(session_logits(session, STAR, 6), kept[1][0])


@pytest.mark.parametrize(
    "host",
    ["eight", {}, {"bits": "8", "chunk_tokens": 8, "head_dim": 32, "dtype": "float32"}],
    ids=["text", "empty", "bits"],
)
def test_a_file_that_does_not_say_what_its_records_are_is_refused(kept, video_model, processor, tmp_path, host):
    stored = tensor_file.read(kept[0])
    tensors = {name: stored.tensor(name) for name in stored.names}
    tensor_file.write(tmp_path / "other.tkv", {**stored.manifest, "host": host}, tensors)
    with pytest.raises(SessionError, match=r"other\.tkv does not say what its records are"):
        load(tmp_path / "other.tkv", video_model, processor)


def test_settings_of_another_kind_are_refused(kept, video_model, processor, tmp_path):
    from tieredkv.storage import tensor_file

    stored = tensor_file.read(kept[0])
    manifest = {**stored.manifest, "tiers": "hybridkv"}
    tensor_file.write(tmp_path / "other.tkv", manifest, {name: stored.tensor(name) for name in stored.names})
    with pytest.raises(SessionError, match=r"other\.tkv holds no session \(its settings are of type str\)"):
        load(tmp_path / "other.tkv", video_model, processor)


@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("change", ["overwritten", "cut"])
def test_a_file_changed_in_place_while_loaded_is_noticed(kept, video_model, processor, tmp_path, asked_before, change):
    import os

    path = kept[0]
    os.utime(path, ns=(0, 0))  # well before the change below
    with load(path, video_model, processor) as session:
        if asked_before:
            session.ask(STAR, max_new_tokens=2)
        if change == "cut":
            os.truncate(path, path.stat().st_size // 2)
        else:
            with path.open("r+b") as file:
                file.seek(path.stat().st_size // 2)
                file.write(b"\xff" * 1000)
        for use in (lambda: session.ask(STAR, max_new_tokens=2), lambda: session.save(tmp_path / "copy")):
            with pytest.raises(SessionError, match="was changed while it was in use"):
                use()
    assert not (tmp_path / "copy").exists()


def test_a_file_replaced_while_loaded_stays_as_it_was(kept, video_model, processor, frames, options):
    path, answers = kept
    with load(path, video_model, processor) as session:
        with tieredkv.open_session(video_model, frames[::-1], **tier_options(**options)) as other:
            other.save(path)
        assert torch.equal(session_logits(session, STAR, 6), answers[0])


def test_a_file_that_counts_from_the_first_picture_is_put_on_the_files_clock(
    video_model, processor, frames, tmp_path, monkeypatch
):
    """The form of the first session files. Only the video says when its first picture is shown."""
    film = with_sound(tmp_path / "late.mp4", frames[:40], begin=5)
    options = {"processor": processor}
    with tieredkv.open_session(video_model, film, fps=4, gpu_kv_gb=1, **options) as session:
        session.save(tmp_path / "now.tkv")
    stored = tensor_file.read(tmp_path / "now.tkv")
    facts = stored.manifest["session"]["video"]
    assert facts.pop("clock") == "file"
    facts["start"] = 0.0
    tensor_file.write(tmp_path / "old.tkv", stored.manifest, {name: stored.tensor(name) for name in stored.names})
    with tieredkv.load_session(tmp_path / "old.tkv", video_model, video=film, **options) as again:
        assert again.ask("what colour was the star ?", max_new_tokens=2).evidence.start == pytest.approx(5.0, abs=0.1)
