"""The word-level tokenizer and the processor: unmodified transformers classes with the words of the scenes."""

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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL),
        model_max_length=32_768,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> Any:
    """A `Qwen2_5_VLProcessor` that scales every frame to 56 x 56 pixels: four tokens for every two frames."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(
            size=size, do_sample_frames=False, max_frames=1_000_000, cap_pixels_per_frame=False
        ),
        chat_template=CHAT_TEMPLATE,
    )
