"""Decoding, encoding and prefill at once: the answers of one after the other, bounded memory, no thread left."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from helpers import PATIENCE_S, assert_near, cap_share, session_logits, stock_inputs, stock_logits, tier_options
from test_pipeline import WatchedPipeline, stage_threads

import tieredkv
from tieredkv.api import new_session
from tieredkv.errors import TieredKVError, UnsupportedModelError, VideoError
from tieredkv.models.families.qwen2_5_vl import Qwen25VL
from tieredkv.session.ingest import Ingest
from tieredkv.session.pipeline import Pipeline
from tieredkv.video.frames import open_video
from tieredkv.video.sampling import Sampling

pytestmark = pytest.mark.files

QUESTION = "what colour was the star ?"


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A 20 s video of 160 frames, 224 x 224, in which every frame differs."""
    import av

    path, noise = tmp_path_factory.mktemp("film") / "film.mp4", np.random.default_rng(3)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=8, options={"g": "24", "crf": "28"})
        stream.width = stream.height = 224
        stream.pix_fmt = "yuv420p"
        for _ in range(160):
            picture = noise.integers(0, 256, (28, 28, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
    return path


@pytest.mark.parametrize("prefill_chunk", [50, 59, 4096])
@pytest.mark.parametrize(
    "sampling",
    [{"fps": 4}, {"fps": 1.5}, {"fps": 8, "max_frames": 33}, {"fps": 4, "start": 3.1, "end": 12.7}],
    ids=["even", "fraction", "spread", "part"],
)
def test_a_file_gives_the_logits_of_stock_transformers(video_model, processor, film, sampling, prefill_chunk):
    """Chunks that divide the prompt and chunks that do not, over frame counts that are even and odd."""
    sampled = open_video(film, Sampling(**sampling))
    frames = np.stack(list(sampled.frames()))
    stock = stock_logits(video_model, stock_inputs(processor, frames, QUESTION, sampled.fps), 3)
    with tieredkv.open_session(
        video_model,
        film,
        gpu_kv_gb=1,
        processor=processor,
        positions="stock",
        prefill_chunk=prefill_chunk,
        encode_batch=24,
        **sampling,
    ) as session:
        assert session.ingest_stats.frames == len(frames)
        assert_near(session_logits(session, QUESTION, 3), stock)


@pytest.mark.parametrize("encode_batch", [1, 12, 4096])
def test_segments_of_any_size_give_the_features_of_the_whole(video_model, processor, frames, encode_batch, monkeypatch):
    pixels = processor.video_processor(
        videos=[torch.from_numpy(frames[:61]).permute(0, 3, 1, 2)], do_sample_frames=False, return_tensors="pt"
    )
    with torch.no_grad():
        outputs = video_model.model.get_video_features(**pixels, return_dict=True)
        whole = torch.cat(tuple(outputs.pooler_output))
    seen = []

    class Recording(Qwen25VL):
        def encode(self, model, inputs):
            seen.append(super().encode(model, inputs))
            return seen[-1]

    session = new_session(video_model, gpu_kv_gb=1, processor=processor, encode_batch=encode_batch)
    with session:
        monkeypatch.setattr(session.template, "family", Recording())
        session.ingest(frames[:61], Sampling(fps=4))
        assert len(seen) > 1 or encode_batch > 240
    assert_near(torch.cat(seen), whole)


def test_frames_of_a_long_video_get_the_size_they_have_in_the_whole(video_model, frames):
    """A processor that shrinks the frames of long videos gets the length of the whole one."""
    from tieredkv.tiny.processor import build_processor

    shrinking = build_processor()
    shrinking.video_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}
    shrinking.video_processor.cap_pixels_per_frame = True
    shrinking.video_processor.max_video_tokens = 300
    large = frames.repeat(2, 1).repeat(3, 2)[:80]
    inputs = stock_inputs(shrinking, large, QUESTION)
    alone = stock_inputs(shrinking, large[:2], QUESTION)
    assert inputs["video_grid_thw"][0, 1:].prod() < alone["video_grid_thw"][0, 1:].prod()
    stock = stock_logits(video_model, inputs, 2)
    with tieredkv.open_session(
        video_model, large, gpu_kv_gb=1, processor=shrinking, fps=4, positions="stock", encode_batch=16
    ) as session:
        assert_near(session_logits(session, QUESTION, 2), stock)


def test_nothing_is_reread_when_the_cap_has_room_for_all(video_model, processor, frames):
    with tieredkv.open_session(
        video_model, frames, gpu_kv_gb=1, processor=processor, fps=4, prefill_chunk=32
    ) as session:
        assert session.ingest_stats.streamed_bytes == 0


def test_a_larger_cap_rereads_less(video_model, processor, frames):
    moved = []
    for share in (0.6, 1.2, 1.8, 3):
        with tieredkv.open_session(
            video_model,
            np.concatenate([frames] * 4),
            gpu_kv_gb=cap_share(video_model, 980, share),
            processor=processor,
            fps=4,
            prefill_chunk=64,
            chunk_tokens=8,
            **tier_options(text_window=8),
        ) as session:
            moved.append(session.ingest_stats.streamed_bytes)
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > moved[-1] == 0


def test_frames_are_never_all_in_memory(video_model, processor, frames, monkeypatch):
    """While prefill is blocked, decoding gets no further than the queues allow."""
    given, waiting, go = [0], threading.Event(), threading.Event()
    long = np.concatenate([frames] * 5)
    decode = Qwen25VL.decode

    def slow_decode(self, *args):
        waiting.set()
        assert go.wait(PATIENCE_S)
        return decode(self, *args)

    class Counting:
        def __init__(self, source):
            self.source = source

        def __getattr__(self, name):
            return getattr(self.source, name)

        def frames(self, *args):
            for frame in self.source.frames(*args):
                given[0] += 1
                yield frame

    monkeypatch.setattr(Qwen25VL, "decode", slow_decode)
    monkeypatch.setattr("tieredkv.session.ingest.Pipeline", WatchedPipeline)
    monkeypatch.setattr("tieredkv.video.frames.open_video", lambda *args, **kw: Counting(open_video(*args, **kw)))
    with new_session(video_model, gpu_kv_gb=1, processor=processor, prefill_chunk=32, encode_batch=16) as session:
        worker = threading.Thread(target=session.ingest, args=(long, Sampling(fps=4)))
        worker.start()
        assert waiting.wait(PATIENCE_S)
        session._ingest.pipeline.wait_for("decode", "encode")
        segment = 8  # frames: 16 tokens at four tokens per two frames
        frame_bytes = given[0]
        go.set()
        worker.join()
        assert frame_bytes <= 10 * segment
        assert given[0] == len(long)


def test_a_file_that_stops_midway_ends_the_ingest_and_leaves_the_session_usable(
    video_model, processor, film, frames, tmp_path
):
    short = tmp_path / "short.mkv"
    remux(film, short)
    short.write_bytes(short.read_bytes()[: int(short.stat().st_size * 0.6)])
    with new_session(video_model, gpu_kv_gb=1, processor=processor, prefill_chunk=32) as session:
        with pytest.raises(VideoError, match=r"short\.mkv: decoding stopped at [\d.]+ s"):
            session.ingest(short, Sampling(fps=4))
        assert stage_threads() == []
        session.ingest(frames[:8], Sampling(fps=4))
        assert session.ask(QUESTION, max_new_tokens=2).token_ids


def remux(source, target) -> None:
    import av

    with av.open(str(source)) as read, av.open(str(target), "w") as write:
        copied = write.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(video=0):
            if packet.dts is not None:
                packet.stream = copied
                write.mux(packet)


def test_an_error_in_the_vision_tower_reaches_the_caller(video_model, processor, frames, monkeypatch):
    def broken(self, model, inputs):
        raise RuntimeError("the tower fell")

    monkeypatch.setattr(Qwen25VL, "encode", broken)
    with pytest.raises(RuntimeError, match="the tower fell"):
        tieredkv.open_session(video_model, frames, gpu_kv_gb=1, processor=processor, fps=4)
    assert stage_threads() == []


def test_an_error_in_prefill_stops_the_other_stages(video_model, processor, frames, monkeypatch):
    def broken(self, *args):
        raise MemoryError

    monkeypatch.setattr(Qwen25VL, "decode", broken)
    with pytest.raises(MemoryError):
        tieredkv.open_session(video_model, frames, gpu_kv_gb=1, processor=processor, fps=4, prefill_chunk=16)
    assert stage_threads() == []


def test_closing_from_another_thread_stops_an_ingest_promptly(video_model, processor, frames, monkeypatch):
    decode, cancel, calls = Qwen25VL.decode, Pipeline.cancel, []
    started, go = threading.Event(), threading.Event()

    def slow_decode(self, *args):
        calls.append(1)
        started.set()
        assert go.wait(PATIENCE_S)
        return decode(self, *args)

    def cancelling(self):
        cancel(self)
        go.set()

    monkeypatch.setattr(Qwen25VL, "decode", slow_decode)
    monkeypatch.setattr(Pipeline, "cancel", cancelling)
    session = new_session(video_model, gpu_kv_gb=1, processor=processor, prefill_chunk=8)
    raised = []

    def ingest() -> None:
        try:
            session.ingest(np.concatenate([frames] * 10), Sampling(fps=4))
        except TieredKVError as error:
            raised.append(str(error))

    worker = threading.Thread(target=ingest)
    worker.start()
    assert started.wait(PATIENCE_S)
    session.close()
    worker.join()
    assert len(calls) == 1
    assert raised == ["the session was closed while its video was being ingested."]
    assert stage_threads() == []


def test_closing_just_before_an_ingest_begins_stops_it_before_the_video_is_opened(
    video_model, processor, frames, monkeypatch
):
    class Late(Ingest):
        def __init__(self, *args):
            session.stop()
            super().__init__(*args)

    def forbidden(*args):
        raise AssertionError("the video was opened")

    monkeypatch.setattr("tieredkv.session.video_session.Ingest", Late)
    monkeypatch.setattr("tieredkv.video.frames.open_video", forbidden)
    session = new_session(video_model, gpu_kv_gb=1, processor=processor)
    with pytest.raises(TieredKVError, match="closed while its video was being ingested"):
        session.ingest(frames, Sampling(fps=4))


def test_the_stages_times_are_measured(video_model, processor, film):
    with tieredkv.open_session(video_model, film, gpu_kv_gb=1, processor=processor, fps=8) as session:
        stats = session.ingest_stats
        plain = stats.as_dict()
    assert min(stats.decode_s, stats.encode_s, stats.prefill_s) > 0
    assert max(stats.decode_s, stats.encode_s, stats.prefill_s) <= stats.wall_s
    assert plain["overlap"] == pytest.approx(stats.overlap)
    assert session.ingest_s >= stats.wall_s


def test_one_display_shows_all_three_stages(video_model, processor, film, capsys):
    with tieredkv.open_session(video_model, film, gpu_kv_gb=1, processor=processor, fps=8, progress=True):
        err = capsys.readouterr().err
    assert err.count("ingest: ") == 1
    assert "encoded" in err
    assert "decode:" not in err


def test_images_that_were_opened_and_not_read_are_a_video(video_model, processor, frames, tmp_path):
    """Hashed and decoded on two threads, which must not read one image at once."""
    from PIL import Image

    for number, picture in enumerate(frames[:40]):
        Image.fromarray(picture).save(tmp_path / f"{number:03}.png")
    for _ in range(3):
        images = [Image.open(path) for path in sorted(tmp_path.iterdir())]
        with tieredkv.open_session(video_model, images, gpu_kv_gb=1, processor=processor, fps=4) as session:
            assert session.video.tokens == 80


def test_it_works_in_inference_mode(video_model, processor, frames):
    options = {"gpu_kv_gb": cap_share(video_model, 280, 0.6), "processor": processor, "fps": 4}
    options |= {"chunk_tokens": 8, "recent_window": 16, "theta": 0.4, "prefill_chunk": 64}
    with tieredkv.open_session(video_model, frames, **tier_options(**options)) as session:
        expected = session.ask(QUESTION, max_new_tokens=8).token_ids
    with torch.inference_mode(), tieredkv.open_session(video_model, frames, **tier_options(**options)) as session:
        assert session.ask(QUESTION, max_new_tokens=8).token_ids == expected


def test_no_thread_is_left_when_a_session_is_closed(video_model, processor, frames):
    before = set(threading.enumerate())
    session = tieredkv.open_session(video_model, frames, gpu_kv_gb=1, processor=processor, fps=4, prefill_chunk=64)
    session.ask(QUESTION, max_new_tokens=3)
    session.close()
    assert set(threading.enumerate()) == before


def test_a_frame_that_cannot_be_read_is_noticed_wherever_it_is(video_model, processor, frames):
    bad = frames.astype(np.float32) / 255
    bad[100] = 7
    for sampling in ({"fps": 4}, {"fps": 4, "end": 10}):
        with pytest.raises(VideoError, match=r"must lie in \[0, 1\]"):
            tieredkv.open_session(video_model, bad, gpu_kv_gb=1, processor=processor, **sampling)


def test_a_video_longer_than_the_models_rotations_allow_is_refused_before_it_is_decoded(monkeypatch):
    """With dynamic rotary embeddings keys would have to be rotated again for each length."""
    import copy

    from families import build

    model, processor = build("internvl")
    model = copy.deepcopy(model)
    text = model.config.text_config
    text.rope_parameters = {**text.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    film = np.zeros((20, 60, 90, 3), dtype=np.uint8)
    options = {"processor": processor, "gpu_kv_gb": 1, "fps": 4}
    planned = tieredkv.plan(model, film, **options, question_tokens=40, max_new_tokens=5)
    text.max_position_embeddings = most = planned.prompt_tokens + 4
    with pytest.raises(UnsupportedModelError, match=rf"above {most:,} tokens.*'dynamic'.*context of {most + 1:,} was"):
        tieredkv.plan(model, film, **options, question_tokens=40, max_new_tokens=5)
    with tieredkv.open_session(model, film, **options) as session:
        with pytest.raises(UnsupportedModelError, match="'dynamic'"):
            session.ask("what is it ?", max_new_tokens=300)
        session.ask("what ?", max_new_tokens=2)
    text.max_position_embeddings = 50
    monkeypatch.setattr("tieredkv.models.encode.encode", None)  # not reached
    with pytest.raises(UnsupportedModelError, match="'dynamic'"):
        tieredkv.open_session(model, film, **options)
