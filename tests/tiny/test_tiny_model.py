"""The bundled model: its files, its processor, its training code, and that it still answers."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers import assert_conversations_equal_stock, assert_near
from safetensors import safe_open

from tieredkv.tiny import train as training
from tieredkv.tiny.clips import Clips
from tieredkv.tiny.encode import encode, to_pairs, to_patches
from tieredkv.tiny.evaluate import evaluate, prepare
from tieredkv.tiny.model import ARCHITECTURES, FPS, PATH, build_model, load
from tieredkv.tiny.packed import forward
from tieredkv.tiny.processor import SPECIAL, TOKEN, build_processor
from tieredkv.tiny.prompts import Prefix, tokenize_with
from tieredkv.tiny.scene import make_scene
from tieredkv.tiny.train_decoder import _pack

FEW = {"crowded": 80, "empty": 1}
"""Scenes of which clips are cut, enough for one of each shape and letter: encoding them takes most of a test's time."""
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>what colour was the star ?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def random_model():
    torch.manual_seed(0)
    model = build_model()
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.bias.normal_(std=0.3)
            layer.self_attn.k_proj.bias.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def trained():
    return load()


@pytest.mark.subprocess
def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, tieredkv.tiny.model, tieredkv.tiny.scene, tieredkv.tiny.video;"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_chat_template_gives_the_published_layout(processor) -> None:
    content = [{"type": "video"}, {"type": "text", "text": "what colour was the star ?"}]
    messages = [{"role": "user", "content": content}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == PROMPT


def test_text_survives_the_tokenizer(processor) -> None:
    tokenizer = processor.tokenizer
    text = "follow the star for 4 ?"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    answer = tokenizer("f heart k moon<|im_end|>").input_ids
    assert answer[-1] == tokenizer.eos_token_id == TOKEN["<|im_end|>"]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "f heart k moon"


def test_punctuation_newlines_and_special_tokens_are_split(processor) -> None:
    tokenizer = processor.tokenizer
    assert tokenizer("What colour was the star?").input_ids == tokenizer("what colour was the star ?").input_ids
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(PROMPT).input_ids)
    assert "<unk>" not in tokens
    assert tokens.count("\n") == 5
    assert [token for token in tokens if token in SPECIAL][3:6] == SPECIAL_ORDER
    assert tokenizer.convert_ids_to_tokens(tokenizer("dinosaur").input_ids) == ["<unk>"]


SPECIAL_ORDER = ["<|vision_start|>", "<|video_pad|>", "<|vision_end|>"]


@pytest.mark.parametrize("size", [56, 224])
def test_the_processor_gives_eight_tokens_per_second(processor, size: int) -> None:
    frames = np.zeros((16, size, size, 3), np.uint8)
    inputs = prepare(processor, frames, "what colour was the star ?")
    assert inputs["video_grid_thw"].tolist() == [[8, 4, 4]]
    assert inputs["second_per_grid_ts"].tolist() == [0.5]
    assert int((inputs["input_ids"] == TOKEN["<|video_pad|>"]).sum()) == 32
    assert int(inputs["mm_token_type_ids"].eq(2).sum()) == 32


def test_temporal_positions_advance_by_two_per_grid_step(random_model) -> None:
    """Two frames of four a second; transformers 5.17 itself cuts the half second to 0, so it is not asked."""
    from tieredkv.models.families.base import VideoGrid
    from tieredkv.models.families.qwen2_5_vl import Qwen25VL

    video = VideoGrid(8, 2, 2, Qwen25VL().step_frames(random_model.config) / FPS)
    positions = Qwen25VL().positions(random_model, 3, video, 0, 40, "published")
    assert positions[0, 3:35:4].diff().tolist() == [2] * 7


@torch.no_grad()
def test_batched_vision_equals_the_stock_tower(processor, random_model) -> None:
    frames = make_scene(3, 6, 2).frames()
    stock = processor.video_processor(videos=[frames], do_sample_frames=False, return_tensors="pt")
    patches = to_patches(to_pairs(frames))
    torch.testing.assert_close(patches.flatten(0, 1), stock["pixel_values_videos"])
    expected = random_model.model.visual(stock["pixel_values_videos"], grid_thw=stock["video_grid_thw"])
    features = encode(random_model.model.visual, patches).flatten(0, 1)
    assert_near(features, expected.pooler_output)


@pytest.mark.slow
@torch.no_grad()
def test_packed_conversations_equal_the_stock_forward_of_each(random_model, processor) -> None:
    language_model = random_model.model.language_model
    rng = np.random.default_rng(0)
    clips = Clips(random_model, 0, **FEW)
    videos = [clips.splice(rng, 20, 3), clips.splice(rng, 20, 4, random_letters=True)]
    tokenize = tokenize_with(processor.tokenizer)
    packed, _ = _pack(rng, tokenize, Prefix(tokenize, rng, 20), videos, 3, language_model.embed_tokens)
    hidden = forward(language_model, packed)
    assert_conversations_equal_stock(language_model, packed, hidden)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_training_stage_runs(tmp_path, architecture: str, monkeypatch) -> None:
    monkeypatch.setattr(training, "train_vision", partial(training.train_vision, batch=48))
    shorter = (replace(stage, lengths=(min(stage.lengths[0], 100), stage.lengths[1])) for stage in training.CURRICULUM)
    monkeypatch.setattr(training, "CURRICULUM", tuple(shorter))
    monkeypatch.setattr(training, "Clips", lambda model, seed, *sizes: Clips(model, seed, **FEW))
    training.train(tmp_path, quick=True, architecture=architecture)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    done = [line["done"] for line in lines if "done" in line]
    assert done == ["vision", *(stage.name for stage in training.CURRICULUM)]
    model, _ = load(path=tmp_path / "weights")
    losses = [line["loss"] for line in lines if line.get("stage") == training.CURRICULUM[0].name]
    assert losses[-1] < math.log(model.config.text_config.vocab_size) + 1  # that of guessing, and a little
    assert model.config.model_type == architecture
    assert next(model.parameters()).isfinite().all()


@pytest.mark.model
def test_the_weights_are_small_and_bf16() -> None:
    assert sum(path.stat().st_size for path in PATH.iterdir()) <= 16 * 2**20
    with safe_open(PATH / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118


@pytest.mark.model
def test_the_bundled_files_are_those_the_code_builds(processor, trained) -> None:
    model, bundled = trained
    assert bundled.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert bundled.chat_template == processor.chat_template
    assert bundled.video_processor.to_dict() == processor.video_processor.to_dict()
    assert model.generation_config.do_sample is False


@pytest.mark.model
@pytest.mark.parametrize(("positions", "scenes"), [("stock", 1), ("next", 3)])
def test_new_scenes_are_answered(trained, positions: str, scenes: int) -> None:
    """Stock transformers reads the video again for each question."""
    score = evaluate(*trained, tokens=1024, scenes=scenes, cards=8, positions=positions)
    assert sum(score.exact) >= 0.95 * len(score.exact), score.summary()


@pytest.mark.model
def test_a_video_file_is_answered(trained) -> None:
    score = evaluate(*trained, tokens=512, scenes=2, cards=6, mp4=True)
    assert sum(score.exact) >= 0.95 * len(score.exact), score.summary()
