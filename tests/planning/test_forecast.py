"""plan: its sizes are the cache's own, it refuses what a session refuses, and what it suggests fits."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from command_line import run
from families import sampled_of
from helpers import random_text_model, text_config, tier_options

from tieredkv.api import new_session
from tieredkv.config import TierConfig
from tieredkv.errors import BudgetError, OptionError, UnsupportedModelError, VideoError
from tieredkv.memory import limits
from tieredkv.memory.units import GIB, size_text
from tieredkv.models import encode
from tieredkv.models.families.base import VideoGrid
from tieredkv.models.families.qwen2_5_vl import Qwen25VL
from tieredkv.planning import planned
from tieredkv.planning.forecast import plan
from tieredkv.planning.report import MemoryPlan
from tieredkv.tiny.model import PATH, build_config
from tieredkv.video.sampling import Sampling

QUESTION, NEW = "what colour was the star ?", 6
SMALL = {"chunk_tokens": 8, "text_window": 16, "recent_window": 8, "prefill_chunk": 64}


def published_config(layers: int, heads: int, kv_heads: int, hidden: int, inner: int, tied: bool):
    """A config in the shape of a published Qwen2.5-VL."""
    from transformers import Qwen2_5_VLConfig

    text = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "vocab_size": 151_936 if tied else 152_064,
        "tie_word_embeddings": tied,
    }
    vision = {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16, "out_hidden_size": hidden}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """16 GiB of host memory, 1 TiB of disk, and a transformers that loads no weights."""
    from transformers import PreTrainedModel

    def refuse(*args, **options):
        raise AssertionError("a plan loaded weights")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    monkeypatch.setattr(limits, "available_host_bytes", lambda: 16 * GIB)
    _set_free_disk(monkeypatch, 1024 * GIB)


@pytest.fixture
def full_disk(machine, monkeypatch):
    """No disk has room for what host memory does not hold."""
    _set_free_disk(monkeypatch, 1000)


def _set_free_disk(monkeypatch, nbytes):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=nbytes))


@pytest.fixture(scope="module")
def seven_billion():
    return published_config(28, 28, 4, 3584, 18_944, tied=False)


@pytest.fixture
def film(monkeypatch, tmp_path):
    """A film of 600 s, 640x360, that consists of its header."""

    def open_video(video, sampling):
        seconds = (600.0 if sampling.end is None else sampling.end) - sampling.start
        expected = min(int(seconds * sampling.fps), sampling.max_frames or 10**9)
        return SimpleNamespace(
            name=video, height=360, width=640, fps=sampling.fps, expected=expected, start=0.0, seconds=seconds, cues=()
        )

    monkeypatch.setattr(planned, "open_video", open_video)
    (tmp_path / "film.mp4").write_bytes(b"a header")
    return str(tmp_path / "film.mp4")


# ---- published models


def test_bytes_per_token_are_those_of_the_published_models(seven_billion):
    three = plan(published_config(36, 16, 2, 2048, 11_008, tied=True), 1000)
    seven = plan(seven_billion, 1000)
    assert three.shape.token_bytes == 36 * 1024
    assert seven.shape.token_bytes == 56 * 1024
    assert seven.full_bytes == seven.prompt_tokens * 56 * 1024
    assert seven.dtype == "bfloat16"
    # 3.75 and 8.29 billion parameters; a step of the 3B reads all of them but the vision tower's.
    assert 3.7e9 < (three.decoder_bytes + three.vision_bytes) / 2 < 3.8e9
    assert 8.2e9 < (seven.decoder_bytes + seven.vision_bytes) / 2 < 8.4e9
    assert three.step_weight_bytes == three.decoder_bytes
    assert seven.decoder_bytes - seven.step_weight_bytes == 2 * 152_064 * 3584


def test_weights_counted_from_the_config_are_those_of_the_model(video_model):
    model = plan(video_model, 500)
    config = plan(video_model.config, 500)
    assert model.dtype == "float32"
    assert sum(p.nbytes for p in video_model.parameters()) == model.decoder_bytes + model.vision_bytes
    assert model.vision_bytes == sum(p.nbytes for p in video_model.model.visual.parameters())
    assert (model.decoder_bytes * config.shape.itemsize, model.vision_bytes * config.shape.itemsize) == (
        config.decoder_bytes * 4,
        config.vision_bytes * 4,
    )


def test_a_config_is_planned_after_its_model_was_saved(tmp_path):
    model = random_text_model("llama")
    model.save_pretrained(tmp_path)
    assert isinstance(model.config.dtype, str)
    assert plan(model.config, 500).dtype == "float32"


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_5_text"])
def test_a_text_model_is_planned_for_a_number_of_tokens(kind):
    config = text_config(kind)
    memory_plan = plan(config, 5000, question_tokens=40)
    assert (memory_plan.prompt_tokens, memory_plan.visual_tokens, memory_plan.vision_bytes) == (5040, 0, 0)
    assert memory_plan.full_bytes == 5040 * memory_plan.shape.token_bytes
    model = random_text_model(kind)
    assert 2 * memory_plan.decoder_bytes == sum(p.nbytes for p in model.parameters())
    assert plan(model, 5000, question_tokens=40).decoder_bytes == 2 * memory_plan.decoder_bytes
    text = str(memory_plan)
    assert "vision" not in text
    assert "visual" not in text
    with pytest.raises(BudgetError, match=r"give at most [\d,]+ tokens.* or host_kv_gb="):
        plan(config, 10**6, host_kv_gb=0.1, gpu_kv_gb=1)


def test_a_text_model_is_not_planned_for_a_video(film):
    with pytest.raises(UnsupportedModelError, match="'llama' take no video"):
        plan(text_config("llama"), film)


def test_other_models_are_refused_with_the_reason():
    from transformers import Gemma3Config, Qwen2_5_VLConfig

    with pytest.raises(UnsupportedModelError, match="takes images but no video"):
        plan(Gemma3Config(), 100)
    with pytest.raises(UnsupportedModelError, match="'qwen2_5_vl_text' are not supported for video"):
        plan(Qwen2_5_VLConfig().text_config, 100)


def test_a_quantised_checkpoint_is_planned_with_its_bytes(seven_billion):
    config = copy.deepcopy(seven_billion)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    plain, quantised = plan(seven_billion, 1000), plan(config, 1000)
    table = 2 * 152_064 * 3584
    linear = plain.decoder_bytes - 2 * table
    assert quantised.decoder_bytes == pytest.approx(2 * table + linear * (0.5 + 4 / 64) / 2, rel=2e-3)
    assert quantised.vision_bytes < 0.35 * plain.vision_bytes
    assert quantised.full_bytes == plain.full_bytes
    assert "(bitsandbytes, 4 bits)" in str(quantised)
    assert config.quantization_config == {"quant_method": "bitsandbytes", "load_in_4bit": True}


def test_times_follow_from_the_bytes(seven_billion):
    memory_plan = plan(seven_billion, 131_072, link=10, card=1000)
    assert memory_plan.step_copy_ms == pytest.approx(memory_plan.step_copy_bytes / 1e7)
    assert memory_plan.prefill_copy_s == pytest.approx(memory_plan.prefill_copy_bytes / 1e10)
    assert plan(seven_billion, 131_072).step.time is None
    assert plan(seven_billion, 1000, card="rtx4090", link="PCIe5x16").card_gb_s == 1008


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("gib", [0.75, 2, 30])
def test_both_phases_stay_under_the_cap(seven_billion, gib, share):
    memory_plan = plan(seven_billion, 131_072, gpu_kv_gb=gib, static_share=share)
    assert sum(memory_plan.prefill.values()) <= memory_plan.cap_bytes
    assert sum(memory_plan.decode.values()) <= memory_plan.cap_bytes
    assert memory_plan.static_heads == round(share * 112)
    assert memory_plan.step_copy_bytes <= memory_plan.step_read_bytes


def test_a_cap_beyond_the_cache_copies_nothing(seven_billion):
    memory_plan = plan(seven_billion, 10_000, gpu_kv_gb=8)
    assert (memory_plan.step_copy_bytes, memory_plan.prefill_copy_bytes) == (0, 0)
    assert memory_plan.dynamic_tokens == memory_plan.prompt_tokens + memory_plan.new_tokens


# ---- against a session


def test_a_plan_refuses_with_the_cap_of_the_session(video_model, processor, frames):
    with (
        new_session(video_model, processor=processor, gpu_kv_gb=1e-5, **tier_options(**SMALL)) as session,
        pytest.raises(BudgetError) as refused,
    ):
        session.ingest(frames, Sampling(fps=4.0), question="?", max_new_tokens=NEW)
    tail = processor.tokenizer("<|vision_end|>?<|im_end|>\n<|im_start|>assistant\n").input_ids
    with pytest.raises(BudgetError) as planned:
        plan(
            video_model,
            frames,
            processor=processor,
            fps=4.0,
            gpu_kv_gb=1e-5,
            question_tokens=len(tail),
            max_new_tokens=NEW,
            **tier_options(**SMALL),
        )
    assert str(planned.value) == str(refused.value)


# ---- refusals name what fits


def test_the_smallest_device_cap_named_is_enough(seven_billion):
    with pytest.raises(BudgetError, match="the smallest that works is") as refused:
        plan(seven_billion, 131_072, gpu_kv_gb=0.1)
    works = float(re.search(r"works is ([\d.]+)\. ", str(refused.value))[1])
    memory_plan = plan(seven_billion, 131_072, gpu_kv_gb=works, static_share=0.0)
    assert sum(memory_plan.decode.values()) <= memory_plan.cap_bytes


@pytest.mark.usefixtures("full_disk")
def test_every_change_named_for_the_host_is_enough_and_more_is_not(film):
    options = {"gpu_kv_gb": 0.01, "host_kv_gb": 0.0042, "host_kv_bits": 16, "prefill_chunk": 256}
    with pytest.raises(
        BudgetError, match=r"needs .* of host memory, host_kv_gb allows 4\.3.*; or .* of disk"
    ) as refused:
        plan(PATH, film, fps=4.0, **options)
    assert re.search(
        r"1000 B free in .*: give fps=.*, host_kv_bits=8 or host_kv_gb=\S*, or free some", str(refused.value)
    )
    fps, max_pixels, host = (
        float(re.search(rf"{name}=([\d.]+\d)", str(refused.value).split(": give")[1])[1])
        for name in ("fps", "max_pixels", "host_kv_gb")
    )
    plan(PATH, film, fps=fps, **options)
    plan(PATH, film, fps=4.0, max_pixels=int(max_pixels), **options)
    plan(PATH, film, fps=4.0, **{**options, "host_kv_gb": host})
    plan(PATH, film, fps=4.0, **{**options, "host_kv_bits": 8})
    with pytest.raises(BudgetError):
        plan(PATH, film, fps=1.05 * fps, **options)
    with pytest.raises(BudgetError):
        plan(PATH, film, fps=4.0, max_pixels=56 * 56, **options)


def test_a_number_of_tokens_is_refused_with_the_number_that_fits(seven_billion, full_disk):
    with pytest.raises(BudgetError, match=r"at most [\d,]+ visual tokens, host_kv_bits=4 or host_kv_gb=") as refused:
        plan(seven_billion, 200_000, host_kv_gb=4)
    plan(seven_billion, 200_000, host_kv_gb=4, host_kv_bits=4)
    tokens = int(re.search(r"at most ([\d,]+)", str(refused.value))[1].replace(",", ""))
    plan(seven_billion, tokens, host_kv_gb=4)
    with pytest.raises(BudgetError):
        plan(seven_billion, tokens + 32, host_kv_gb=4)


def test_what_host_memory_does_not_hold_may_go_to_disk(seven_billion, monkeypatch):
    monkeypatch.setattr(limits, "available_host_bytes", lambda: 8 * GIB)
    with pytest.raises(BudgetError, match=r"or host_kv_gb=[\d.]+ to keep the rest on disk\.$") as refused:
        plan(seven_billion, 200_000, host_kv_bits=16)
    option = re.search(r"host_kv_gb=([\d.]+) to", str(refused.value))[1]
    memory_plan = plan(seven_billion, 200_000, host_kv_bits=16, host_kv_gb=float(option))
    assert memory_plan.host_bytes <= 0.8 * 8 * GIB
    assert memory_plan.disk_bytes >= memory_plan.full_bytes
    disk = (
        f"disk              {size_text(memory_plan.disk_bytes)}, in {memory_plan.disk_folder}: host memory has room for"
    )
    assert f"{disk} {memory_plan.recent_bytes / memory_plan.disk_bytes:.0%} of it" in str(memory_plan)
    assert 0 < memory_plan.recent_bytes < memory_plan.host_bytes
    with pytest.raises(
        BudgetError, match=r"with the rest of it on disk, host_kv_gb allows .*: the smallest that works is"
    ):
        plan(seven_billion, 200_000, host_kv_bits=16, host_kv_gb=0.5)


def test_chunks_on_disk_are_not_copied_ahead(seven_billion):
    options = {"gpu_kv_gb": 2, "host_kv_bits": 8, "budget_ratio": 0.1, "card": "RTX 4090"}
    in_memory, on_disk = (plan(seven_billion, 131_072, host_kv_gb=gib, **options) for gib in (8, 2))
    assert (in_memory.disk_bytes, on_disk.disk_bytes > 0) == (0, True)
    assert (in_memory.step.ahead, on_disk.step.ahead) == (True, False)
    assert "copies ahead      off: chunks are on disk" in str(on_disk)


@pytest.mark.usefixtures("full_disk")
def test_without_a_host_cap_a_safe_share_of_the_memory_is_the_limit(seven_billion, monkeypatch):
    plan(seven_billion, 200_000)
    monkeypatch.setattr(limits, "available_host_bytes", lambda: 13 * GIB)
    with pytest.raises(BudgetError, match=r"80% of what is available.*, host_kv_bits=8 or host_kv_gb=1\S+\.$"):
        plan(seven_billion, 200_000, host_kv_bits=16)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"video_or_tokens": 0}, OptionError, "visual tokens=0 is not valid"),
        ({"video_or_tokens": True}, OptionError, "visual tokens=True is not valid"),
        ({"question_tokens": 0}, OptionError, "question_tokens=0 is not valid"),
        ({"static_share": 1.5}, OptionError, "static_share=1.5 is not valid"),
        ({"link": "usb"}, OptionError, "link='usb' is not known: give GB/s, or one of pcie3x16"),
        ({"card": "-1"}, OptionError, "card='-1' is not known"),
        ({"nonsense": 1}, OptionError, "nonsense"),
        ({"tiers": TierConfig(), "host_kv_gb": 3}, OptionError, "either tiers or host_kv_gb"),
        ({"gpu_kv_gb": 0}, BudgetError, "gpu_kv_gb=0 is not valid"),
        ({"host_kv_bits": 5}, OptionError, "host_kv_bits=5 is not valid: give None or one of 16, 8, 4"),
        ({"model": 3}, UnsupportedModelError, "model is a int"),
        ({"model": "/nowhere"}, UnsupportedModelError, "no usable model found there"),
        ({"video_or_tokens": "/nowhere.mp4"}, VideoError, "no such file"),
    ],
    ids=lambda value: "tiers" if isinstance(value, dict) and "tiers" in value else str(value),  # names no address
)
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        plan(**{"model": PATH, "video_or_tokens": 100, **options})


def test_a_processor_that_refuses_the_frames_is_an_error_of_the_video(film, monkeypatch, processor):
    def refuse(*args, **options):
        raise ValueError("too thin")

    monkeypatch.setattr(type(processor.video_processor), "__call__", refuse)
    with pytest.raises(VideoError, match="refuses frames of 640x360: too thin"):
        plan(PATH, film, processor=processor)


def test_a_package_that_the_vision_tower_needs_is_named(seven_billion, monkeypatch):
    from transformers import AutoModelForImageTextToText

    def missing(*args, **options):
        raise ImportError(
            "\nTheTower requires the timm library but it was not found. Install it:\n`pip install timm`\n"
        )

    monkeypatch.setattr(AutoModelForImageTextToText, "from_config", missing)
    with pytest.raises(UnsupportedModelError, match=r"cannot be built .*requires the timm library"):
        plan(seven_billion, 100)


# ---- the vision tower's calls


def batch_tokens(height, width, grid, tiers):
    return encode.batch_tokens(Qwen25VL(), build_config(), sampled_of(1, height, width), VideoGrid(*grid, 0.5), tiers)


def test_a_call_of_the_tower_takes_whole_steps_within_the_bounds():
    tiers = TierConfig()
    for grid in [(500, 2, 2), (3, 2, 2), (500, 40, 40), (500, 7, 11)]:
        batch = batch_tokens(360, 640, grid, tiers)
        step = grid[1] * grid[2]
        assert batch % step == 0
        assert step <= batch <= max(step, min(grid[0] * step, tiers.prefill_chunk // 2))


def test_large_frames_make_calls_smaller():
    small = batch_tokens(56, 56, (5000, 2, 2), TierConfig(prefill_chunk=10**6))
    large = batch_tokens(2160, 3840, (5000, 2, 2), TierConfig(prefill_chunk=10**6))
    assert large < small
    assert large * 2 * 2160 * 3840 * 3 / 4 <= encode.ENCODE_BYTES


@pytest.mark.parametrize(("asked", "given"), [(1, 4), (4, 4), (11, 8), (10**9, 2000)])
def test_encode_batch_decides_in_whole_steps(asked, given):
    assert batch_tokens(56, 56, (500, 2, 2), TierConfig(encode_batch=asked)) == given


# ---- what is printed


def test_the_table_fits_a_terminal_and_says_what_is_assumed(film):
    text = str(plan(PATH, film, fps=4.0, gpu_kv_gb=0.002, card="RTX 3060"))
    lines = text.splitlines()
    assert len(lines) <= 36
    assert max(len(line) for line in lines) <= 110
    for words in ("film.mp4: 2,400 frames of 640x360", "as assumed", "estimates, not measured", "by its data sheet"):
        assert words in text


def test_the_table_shows_the_frames_that_the_tower_sees(film):
    large, small = (str(plan(PATH, film, fps=4.0, gpu_kv_gb=0.1, max_pixels=size)) for size in (28 * 28 * 8, 28 * 28))
    assert "steps of 2x3 (frames of 84x56), " in large
    assert "steps of 1x1 (frames of 28x28), " in small


def test_a_step_is_predicted_by_part_and_says_what_is_assumed(seven_billion):
    options = {"gpu_kv_gb": 2, "card": "RTX 4090", "link": "pcie4x16"}
    ranked, everything = (
        plan(seven_billion, 131_072, **options),
        plan(seven_billion, 131_072, **options | {"gpu_kv_gb": 4}),
    )
    parts = asdict(ranked.step.time)
    assert ranked.step.time.total == pytest.approx(sum(parts.values()) - parts["hidden"])
    assert (everything.step.time.link, everything.step.time.ranking, everything.step.hit_rate) == (0, 0, None)
    assert everything.step.time.weights == ranked.step.time.weights < ranked.step.model_ms
    assert "(assumed)" in str(ranked)
    assert "assumed         bandwidth share, launch time" in str(ranked)
    assert f"of the model alone {ranked.step.model_ms:.3g} ms" in str(ranked)
    assert "limited by        nothing: a step attends to everything" in str(everything)


def test_the_link_limits_a_step_where_a_card_is_named(seven_billion):
    def planned(**options):
        return plan(seven_billion, 131_072, gpu_kv_gb=2, **options)

    card = {"card": "RTX 4090"}
    unlimited = planned(**card, step_overhead=math.inf)
    for link, bound in (("pcie5x16", "link"), ("pcie4x16", "link"), ("pcie3x16", "floor")):
        limited = planned(**card, link=link)
        assert limited.step.bound == bound
        assert limited.dynamic_tokens < unlimited.dynamic_tokens
        allowed = 0.15 * limited.step.model_ms
        assert (limited.step.time.link + limited.step.time.prediction <= allowed) is (bound == "link")
    assert unlimited.step.bound == planned().step.bound == "memory"
    assert ("the link may allow less" in str(planned()), "the link may allow less" in str(unlimited)) == (True, False)
    plain = planned(**card, step_overhead=math.inf, ahead=False)
    assert plain.dynamic_tokens == planned().dynamic_tokens  # without a card, nothing is known of the link
    assert 0.98 < unlimited.dynamic_tokens / plain.dynamic_tokens < 1  # what predicts queries takes some room
    assert planned(**card, link_gb_s=25.0).dynamic_tokens == planned(**card).dynamic_tokens
    given = planned(**card, budget_ratio=0.2)
    assert (given.step.bound, given.dynamic_tokens > limited.dynamic_tokens) == ("budget_ratio", True)


@pytest.mark.usefixtures("full_disk")
def test_the_command_says_what_fit_chose(monkeypatch, capsys, film):
    budget = ("--gpu-kv-gb", "0.01", "--host-kv-gb", "0.003", "--host-kv-bits", "16")
    code, out, err = run(monkeypatch, capsys, "plan", film, "-m", "tiny", "--fit", *budget)
    assert code == 0
    assert "tieredkv: fit: 1.8 frames per second at 56x28, " in err
    assert "at 1.8 per second" in out


def test_the_dictionary_is_json_and_complete(seven_billion):
    memory_plan = plan(seven_billion, 1000, card=500)
    values = json.loads(json.dumps(memory_plan.as_dict()))
    names = set(MemoryPlan.__dataclass_fields__) - {"shape"}
    assert names | {"layers", "token_bytes", "step_copy_ms", "prefill_copy_s"} <= values.keys()
    assert values["step"]["ms"]["total"] == memory_plan.step.time.total
    assert values["step"]["tokens_per_s"] == pytest.approx(1000 / memory_plan.step.time.total)
    assert "hit rate" in values["step"]["assumed"]
    assert values["decode"] == memory_plan.decode


def test_the_command_prints_a_table_or_json(monkeypatch, capsys, film):
    code, out, _ = run(
        monkeypatch, capsys, "plan", film, "-m", "tiny", "--gpu-kv-gb", "0.002", "--fps", "4", "--end", "300"
    )
    assert code == 0
    assert "1,200 frames" in out
    assert "resident" in out
    code, out, _ = run(monkeypatch, capsys, "plan", "5000", "--json", "--card", "rtx 4090", "--link", "13")
    assert code == 0
    assert json.loads(out)["visual_tokens"] == 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["5000", "--gpu-kv-gb", "0.0001"], "the smallest that works is"),
        (["50000", "--host-kv-gb", "0.001", "--gpu-kv-gb", "1"], "host_kv_gb allows 1.02 MiB: the smallest"),
        (["5000", "--link", "string"], "link='string' is not known"),
        (["gone.mp4"], "gone.mp4: no such file"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_the_command_refuses_in_one_sentence_with_exit_code_2(monkeypatch, capsys, arguments, message):
    code, out, err = run(monkeypatch, capsys, "plan", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("policy", "static"), [("snapkv", 112), ("arkvale", 0), ("quest", 8), ("hybridkv", 56)])
def test_what_a_policy_fixes_is_not_assumed(seven_billion, policy, static):
    memory_plan = plan(seven_billion, 4096, gpu_kv_gb=1, static_share=0.5, policy=policy)
    assert memory_plan.static_heads == static
