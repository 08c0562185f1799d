"""The hybrid tiny model: its delta rule, branching states, prompts and files, and that it still answers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_conversations_equal_stock, assert_near
from safetensors import safe_open

from tieredkv.models.families.base import VideoGrid
from tieredkv.models.families.qwen3_5 import Qwen35
from tieredkv.tiny.clips import Video
from tieredkv.tiny.delta_rule import delta_rule
from tieredkv.tiny.encode import TOKENS, encode, to_pairs, to_patches
from tieredkv.tiny.evaluate import evaluate, prepare
from tieredkv.tiny.model import build_model, load, save
from tieredkv.tiny.packed_hybrid import forward
from tieredkv.tiny.processor import SECONDS, SPECIAL, TOKEN, build_processor
from tieredkv.tiny.prompts import TimedPrefix, tokenize_with
from tieredkv.tiny.scene import make_scene
from tieredkv.tiny.train_decoder import _pack

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from models import HYBRID

QUESTION = "what colour was the star ?"


@pytest.fixture(scope="module")
def processor():
    return build_processor("qwen3_5")


@pytest.fixture(scope="module")
def random_model():
    torch.manual_seed(0)
    return build_model("qwen3_5").eval()


@pytest.fixture(scope="module")
def trained():
    return load(path=HYBRID)


def random_rule(length: int, generator: torch.Generator) -> list[torch.Tensor]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(2, 3, length, *shape, generator=generator)

    keys = torch.nn.functional.normalize(draw(8), dim=-1)
    return [draw(8), keys, draw(5), -draw().exp() * 0.2, draw().sigmoid()]


@pytest.mark.parametrize("length", [1, 7, 16, 45])
def test_the_delta_rule_in_chunks_equals_it_token_by_token(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    q, k, v, log_decay, beta = random_rule(length, generator)
    state = torch.randn(2, 3, 8, 5, generator=generator)
    outputs, after = delta_rule(q, k, v, log_decay, beta, state, chunk=16)
    for t in range(length):
        state = state * log_decay[:, :, t, None, None].exp()
        change = (v[:, :, t] - torch.einsum("nhkv,nhk->nhv", state, k[:, :, t])) * beta[:, :, t, None]
        state = state + k[:, :, t, :, None] * change[:, :, None]
        assert_near(outputs[:, :, t], torch.einsum("nhkv,nhk->nhv", state, q[:, :, t]))
    assert_near(after, state)


def test_the_delta_rule_does_not_depend_on_the_chunk() -> None:
    given = random_rule(40, torch.Generator().manual_seed(0))
    for one, other in zip(delta_rule(*given, chunk=40), delta_rule(*given, chunk=8), strict=True):
        assert_near(one, other)


@torch.no_grad()
def test_packed_conversations_equal_the_stock_forward_of_each(random_model, processor) -> None:
    """Each continues from the states at the video's end, and sees none of the others."""
    language_model = random_model.model.language_model
    rng, generator = np.random.default_rng(1), torch.Generator().manual_seed(0)
    cards = {"star": ("red", "b"), "heart": ("blue", "a"), "moon": ("pink", "c")}
    videos = [Video(torch.randn(20, TOKENS, 256, generator=generator), cards) for _ in range(2)]
    tokenize = tokenize_with(processor.tokenizer)
    packed, _ = _pack(rng, tokenize, TimedPrefix(tokenize, rng, 20), videos, 3, language_model.embed_tokens)
    hidden = forward(language_model, packed)
    assert_conversations_equal_stock(language_model, packed, hidden)


@torch.no_grad()
def test_batched_vision_equals_the_stock_tower(processor, random_model) -> None:
    frames = make_scene(3, 6, 2).frames()
    stock = processor.video_processor(videos=[frames], do_sample_frames=False, return_tensors="pt")
    patches = to_patches(to_pairs(frames))
    torch.testing.assert_close(patches.flatten(0, 1), stock["pixel_values_videos"])
    expected = random_model.model.visual(stock["pixel_values_videos"], grid_thw=stock["video_grid_thw"])
    assert_near(encode(random_model.model.visual, patches).flatten(0, 1), expected.pooler_output)


def test_text_survives_the_tokenizer(processor) -> None:
    tokenizer = processor.tokenizer
    for text in ("follow the star for 4 ?", "f heart k moon", "Grüße, 12!"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_each_word_of_an_answer_is_one_token(processor) -> None:
    tokenizer = processor.tokenizer
    assert len(tokenizer("f heart k moon<|im_end|>").input_ids) == 5
    assert len(tokenizer("red<|im_end|>").input_ids) == 2
    assert [tokenizer.convert_tokens_to_ids(name) for name in SPECIAL] == [TOKEN[name] for name in SPECIAL]


def test_a_timestamp_is_two_tokens(processor) -> None:
    for seconds in (0.1, 12.5, SECONDS - 0.4):
        assert len(processor.tokenizer(f"<{seconds:.1f} seconds>").input_ids) == 2
    assert len(processor.tokenizer(f"<{SECONDS}.0 seconds>").input_ids) == 3


def test_the_processor_gives_eight_visual_tokens_per_second(processor) -> None:
    inputs = prepare(processor, np.zeros((16, 224, 224, 3), np.uint8), QUESTION)
    assert inputs["video_grid_thw"].tolist() == [[8, 4, 4]]
    assert int(inputs["mm_token_type_ids"].eq(2).sum()) == 32


class _Drawn:
    """Stands in for a random generator that draws these numbers."""

    def __init__(self, *numbers: float) -> None:
        self.random = iter(numbers).__next__


def test_training_writes_and_numbers_a_video_as_transformers_does(processor, random_model) -> None:
    inputs = prepare(processor, np.zeros((16, 56, 56, 3), np.uint8), QUESTION)
    prefix = TimedPrefix(tokenize_with(processor.tokenizer), _Drawn(0.0, 0.0), 8)
    count = len(prefix.ids)
    assert inputs["input_ids"][0, :count].tolist() == prefix.ids
    positions, _ = random_model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        video_grid_thw=inputs["video_grid_thw"],
    )
    place = prefix.place(np.random.default_rng(0))
    assert torch.equal(place.prefix, positions[:, 0, :count])
    assert place.first == positions[0, 0, count]


def test_training_numbers_a_video_as_its_family_does(processor, random_model) -> None:
    tokenize = tokenize_with(processor.tokenizer)
    prefix = TimedPrefix(tokenize, _Drawn(1.0, 0.0), 3)
    begin, end = tokenize("<|vision_start|>"), tokenize("<|vision_end|>")
    between = ((), *((*end, *tokenize(f"<{seconds} seconds>"), *begin) for seconds in (0.6, 1.1)))
    head = prefix.ids.index(TOKEN["<|video_pad|>"])
    grid = VideoGrid(3, 2, 2, 0.5, between)
    assert grid.ids(TOKEN["<|video_pad|>"]) == prefix.ids[head:-1]
    positions = Qwen35().positions(random_model, head, grid, 0, len(prefix.ids) + 1, "published")
    place = prefix.place(np.random.default_rng(0))
    assert torch.equal(place.prefix, positions[:, :-1])
    assert place.first == positions[0, -1]


def test_a_saved_model_is_loaded_by_its_path_alone(random_model, processor, tmp_path) -> None:
    """transformers chooses a tokenizer's class by the model's type, whatever class the files state."""
    save(random_model, tmp_path)
    model, loaded = load(path=tmp_path)
    assert model.config.model_type == "qwen3_5"
    text = f"user\n<12.6 seconds><|vision_start|><|video_pad|><|vision_end|>{QUESTION}<|im_end|>"
    assert loaded.tokenizer(text).input_ids == processor.tokenizer(text).input_ids


@pytest.mark.model
def test_the_weights_are_small_and_bf16() -> None:
    assert sum(path.stat().st_size for path in HYBRID.iterdir()) <= 8_000_000
    with safe_open(HYBRID / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118


@pytest.mark.model
def test_the_files_are_those_the_code_builds(processor, trained) -> None:
    model, bundled = trained
    assert bundled.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert bundled.chat_template == processor.chat_template
    assert bundled.video_processor.to_dict() == processor.video_processor.to_dict()
    assert model.generation_config.do_sample is False


@pytest.mark.model
@pytest.mark.parametrize(("positions", "scenes"), [("stock", 1), ("next", 3)])
def test_new_scenes_are_answered(trained, positions: str, scenes: int) -> None:
    score = evaluate(*trained, tokens=512, scenes=scenes, cards=6, positions=positions)
    assert sum(score.exact) >= 0.9 * len(score.exact), score.summary()
