"""The word-level tokenizer and the processor: unmodified transformers classes with the words of the scenes."""

import json
from typing import Any

from tieredkv.tiny.bitmaps import COLOURS, LETTERS, SHAPES
from tieredkv.tiny.draw import SIZE
from tieredkv.tiny.scene import MAX_HOPS

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WORDS = (
    *("<unk>", "\n", "system", "user", "assistant", "you", "are", "helpful", ".", "?"),
    *("what", "colour", "was", "the", "follow", "for"),
    *(str(hops) for hops in range(1, MAX_HOPS + 1)),
    *SHAPES,
    *COLOURS,
    *LETTERS,
    "none",
)
TOKEN = {word: number for number, word in enumerate(SPECIAL + WORDS)}
"""Word or special token -> its id."""

SECONDS = 512
"""Whole seconds up to here are one token of the hybrid's timestamps, as in `<12` `.5 seconds>`; later ones are two."""

# The published Qwen2.5-VL layout: a default system turn, then turns, a video wrapped in vision tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


_TOKENIZER: dict[str, Any] = {
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "additional_special_tokens": list(SPECIAL),
    "model_max_length": 32_768,
    "clean_up_tokenization_spaces": False,
}


def build_tokenizer() -> Any:
    """A `PreTrainedTokenizerFast` that lower-cases, splits at spaces and punctuation, and keeps newlines as tokens.

    Decoding joins words with single spaces. A word outside the vocabulary becomes `<unk>`.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(TOKEN, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[ \t]+"), "removed"),
            pre_tokenizers.Split(Regex("\r?\n|[.?!,]"), "isolated"),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **_TOKENIZER)


def build_hybrid_tokenizer() -> Any:
    """A `Qwen3_5Tokenizer` (transformers loads no other class for this model), whose merges make each word one token.

    Words after a space are tokens of their own. Timestamps are two tokens, below `SECONDS`.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen3_5Tokenizer

    first = ("You", "what", "follow", "system", "user", "assistant", *COLOURS, *LETTERS)
    later = (
        "are",
        "a",
        "helpful",
        "assistant",
        "colour",
        "was",
        "the",
        "for",
        "?",
        *SHAPES,
        *COLOURS,
        *LETTERS,
        "none",
    )
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = Qwen3_5Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,  # more than there are: until every word is merged
        min_frequency=1,
        show_progress=False,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    pairs.train_from_iterator([*first, *(f" {word}" for word in later)], trainer)
    model = json.loads(pairs.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    options: dict[str, Any] = {**_TOKENIZER, "merges": merges, "unk_token": None}
    tokenizer = Qwen3_5Tokenizer(vocab=model["vocab"], **options)
    stamps = [*(f"<{second}" for second in range(SECONDS)), *(f".{tenth} seconds>" for tenth in range(10))]
    tokenizer.add_tokens([AddedToken(stamp, normalized=False) for stamp in stamps])
    return tokenizer


def build_processor(architecture: str = "qwen2_5_vl") -> Any:
    """The architecture's processor, which scales every frame to 56 x 56 pixels: four tokens for every two frames."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor, Qwen3VLProcessor

    # Qwen3-VL's video processor has limits for the whole video, not for a frame: it could not fix the frames' size.
    size = {"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE}
    hybrid = architecture == "qwen3_5"
    return (Qwen3VLProcessor if hybrid else Qwen2_5_VLProcessor)(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=build_hybrid_tokenizer() if hybrid else build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(
            size=size, do_sample_frames=False, max_frames=1_000_000, cap_pixels_per_frame=False
        ),
        chat_template=CHAT_TEMPLATE,
    )
