"""The prefill phase: its forward calls, and what each layer holds on the device during a call.

In a call, new tokens attend to each other and to the past. The first tokens of the past may be resident on the device;
the rest is staged from the host tier, a block at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from tieredkv.codecs import PLAIN
from tieredkv.codecs.base import AT_ONCE_ON_A_CARD
from tieredkv.config import TierConfig
from tieredkv.memory.units import FLOAT32, ceil_div, largest
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning.sizes import chunk_bytes, untiered_bytes
from tieredkv.policy.classify import top_k_count

STAGING_TOKENS = 2048
"""Past tokens staged at a time when the cap has room: enough for copies at link speed."""
MOST_BLOCKS, READING_SHARE = 4, 1 / 16
"""So many times as many if reading them takes at most this share of the cap: starting the operations of a block and
merging its attention take about as long as its attention, and a larger share would leave fewer tokens resident."""


# ---- calls


@dataclass(frozen=True, slots=True)
class Call:
    """A forward call: prompt tokens `begin` to `stop`, of which the last `rows` are scored."""

    begin: int
    stop: int
    rows: int = 0


def context_calls(tokens: int, size: int, first: int = 0) -> list[Call]:
    """The calls for a prompt's tokens `first` to `tokens`, `size` in each but the last; no row is scored."""
    return [Call(begin, min(begin + size, tokens)) for begin in range(first, tokens, size)]


def question_calls(tiers: TierConfig, begin: int, stop: int) -> list[Call]:
    """The calls for prompt tokens `begin` to `stop`, the question: the last call is full, as its rows are scored."""
    size, last = tiers.prefill_chunk, max(begin, stop - tiers.prefill_chunk)
    before = [Call(max(begin, end - size), end) for end in range(last, begin, -size)]
    return [*reversed(before), Call(last, stop, question_rows(tiers, stop - begin))]


def prompt_calls(tiers: TierConfig, prompt: int, question_tokens: int) -> list[Call]:
    """The calls for a prompt of `prompt` tokens, the last `question_tokens` of them the question."""
    context = prompt - question_tokens
    return [*context_calls(context, tiers.prefill_chunk), *question_calls(tiers, context, prompt)]


def question_rows(tiers: TierConfig, question_tokens: int) -> int:
    """How many text rows of a question of `question_tokens` tokens are scored."""
    return min(question_tokens, tiers.prefill_chunk, tiers.policy.text_window)


def untiered_prefill_bytes(shape: KVShape, tiers: TierConfig, prompt: int, question_tokens: int) -> dict[str, int]:
    """Device bytes of the layers that do not grow, by kind, after the call of a prefill that leaves most."""
    calls = (
        untiered_bytes(shape, call.begin, call.stop - call.begin)
        for call in prompt_calls(tiers, prompt, question_tokens)
    )
    return max(calls, key=lambda kinds: sum(kinds.values()))


# ---- one call


@dataclass(frozen=True, slots=True)
class Staging:
    """Device memory for reading one layer's past during a call."""

    block_tokens: int
    """Past tokens read at a time."""
    buffers: int
    """Buffers to stage records to: none if nothing is staged, one, or two in turn if there are several blocks."""
    staged_bytes: int
    """Of each of them."""
    decoded_bytes: int
    """Of the buffer for keys and values of a block, in the model's dtype; 0 if nothing is staged."""
    scoring_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return self.buffers * self.staged_bytes + self.decoded_bytes


def plan_staging(shape: KVShape, tiers: TierConfig, call: Call, resident: int, room: int, bits: int) -> Staging | None:
    """How a layer's past, the tokens before `call.begin`, is read during a call; None when no block fits the cap.

    resident: tokens of the past that are on the device. room: tokens that the device has room for, in every layer.
    bits: of the host tier during the call.
    """
    c, past = tiers.chunk_tokens, call.begin
    to_stage = ceil_div(past - resident, c) * c
    block = block_tokens(shape, tiers, call.stop, call.rows, room, to_stage > 0, bits)
    if block == 0:
        return None
    block = min(block, max(to_stage, ceil_div(max(resident, call.stop - past), c) * c))
    buffers = 0 if to_stage == 0 else 1 if to_stage <= block else 2
    scoring, held = scoring_bytes(shape, tiers, call.stop, call.rows, block, bits), min(block, to_stage)
    return Staging(block, buffers, staged_bytes(shape, tiers, held, bits), buffer_bytes(shape, held), scoring)


def block_tokens(
    shape: KVShape, tiers: TierConfig, tokens: int, rows: int, resident: int, staged: bool, bits: int
) -> int:
    """Past tokens to read at a time, whole chunks: the most that fit the cap, up to `STAGING_TOKENS`, or `MOST_BLOCKS`
    times that; 0 if none do.

    tokens: past and new ones. rows: text rows scored in the same call. resident: tokens of every layer that the device
    holds room for besides. staged: whether buffers are needed, for records of so many bits.
    """
    c = tiers.chunk_tokens
    cap = tiers.cap_bytes - resident * shape.token_bytes

    usual = max(1, STAGING_TOKENS // c)

    def fits(chunks: int) -> bool:
        most = cap if chunks <= usual else min(cap, tiers.cap_bytes * READING_SHARE)
        return reading_bytes(shape, tiers, tokens, rows, chunks * c, staged, bits) <= most

    return c * largest(fits, MOST_BLOCKS * usual)


def reading_bytes(
    shape: KVShape, tiers: TierConfig, tokens: int, rows: int, block: int, staged: bool, bits: int
) -> int:
    """Upper bound of the bytes for reading `block` past tokens at a time: buffers if they are staged, and scores."""
    buffers = 2 * staged_bytes(shape, tiers, block, bits) + buffer_bytes(shape, block) if staged else 0
    return buffers + scoring_bytes(shape, tiers, tokens, rows, block, bits)


def buffer_bytes(shape: KVShape, block_tokens: int) -> int:
    """Keys and values of `block_tokens` tokens of one layer."""
    return 2 * shape.num_key_value_heads * block_tokens * shape.head_dim * shape.itemsize


def staged_bytes(shape: KVShape, tiers: TierConfig, block_tokens: int, bits: int) -> int:
    """Records of `block_tokens` tokens of one layer, whole chunks."""
    return shape.num_key_value_heads * ceil_div(block_tokens, tiers.chunk_tokens) * chunk_bytes(shape, tiers, bits)


def scoring_bytes(shape: KVShape, tiers: TierConfig, tokens: int, rows: int, block_tokens: int, bits: int) -> int:
    """Scratch of scoring one layer's text rows: weights of one block, the running top k, the saliency, and what
    decoding keys of so many bits takes."""
    if rows == 0:
        return 0
    heads = shape.num_attention_heads
    k = top_k_count(tiers.policy.top_k_ratio, tokens) if tiers.policy.scores_mass else 0
    keys_float = shape.num_key_value_heads * block_tokens * shape.head_dim
    weights = 3 * heads * rows * block_tokens
    top = 7 * heads * rows * min(k, tokens)  # old, block's, both joined, and the new with its int64 indices
    at_once = 0 if bits == PLAIN else min(block_tokens, max(AT_ONCE_ON_A_CARD, tiers.chunk_tokens))
    decoded = 3 * shape.num_key_value_heads * at_once * shape.head_dim  # numbers, scaled, and turned back
    return FLOAT32 * (keys_float + weights + top + 2 * shape.num_key_value_heads * tokens + decoded)


def smallest_prefill_bytes(shape: KVShape, tiers: TierConfig, tokens: int, rows: int, bits: int) -> int:
    """The least cap with which `tokens` prompt tokens can be prefilled and `rows` of them scored, with a host tier of
    16 bits at first, and then of `bits`."""
    c = tiers.chunk_tokens
    return max(reading_bytes(shape, tiers, tokens, rows, c, True, each) for each in (PLAIN, bits))


def digesting_bytes(shape: KVShape, tiers: TierConfig, chunks: int) -> int:
    """Scratch of digesting chunks of one layer, on a card. Of their tokens: what is staged, three copies of the keys in
    float32, and products of a chunk's keys with each other. Of each chunk: two vectors, and three copies to pack."""
    c, d = tiers.chunk_tokens, shape.head_dim
    token = d * (2 * shape.itemsize + 3 * FLOAT32) + c * FLOAT32
    return chunks * shape.num_key_value_heads * (c * token + 2 * 4 * d * FLOAT32)


# ---- resident tokens


def resident_tokens(shape: KVShape, tiers: TierConfig, tokens: int, bits: int) -> int:
    """First tokens of every layer to keep on the device while `tokens` tokens are prefilled, whole chunks.

    All of them if they fit, with room to digest a chunk on a card: nothing is then staged from the host. Otherwise as
    many as fit beside the staging buffers: the first are read most often. Room for the scores of `text_window` rows is
    left free if that saves more copies at the end, where residents would be dropped for them, than it costs before.
    bits: of the host tier once it is packed; beside fewer than 16 no question finds residents.
    """
    c, rows = tiers.chunk_tokens, tiers.policy.text_window
    everything = ceil_div(tokens, c) * c
    choices = []
    if everything * shape.token_bytes + digesting_bytes(shape, tiers, 1) <= tiers.cap_bytes:
        choices.append(everything)
    for scored in (0, rows) if bits == PLAIN else (0,):
        block = block_tokens(shape, tiers, tokens, scored, 0, True, bits)
        taken = reading_bytes(shape, tiers, tokens, scored, block, True, bits)
        taken = max(taken, reading_bytes(shape, tiers, tokens, scored, c, True, PLAIN))  # before it is packed
        taken = max(taken, digesting_bytes(shape, tiers, 1))
        left = max(0, tiers.cap_bytes - taken) // shape.token_bytes if block else 0
        choices.append(min(everything, left // c * c))

    def read_again(resident: int) -> float:
        """Tokens copied to the device again: in each call those before it, at the end keys once more for the scores."""
        before = sum(max(0, past - resident) for past in range(0, tokens, tiers.prefill_chunk))
        kept = resident_beside_scores(shape, tiers, resident, Call(tokens, tokens, rows), bits) if bits == PLAIN else 0
        return before + 1.5 * (tokens - min(tokens, kept))

    return min(choices, key=read_again)


def resident_beside_scores(shape: KVShape, tiers: TierConfig, resident: int, call: Call, bits: int) -> int:
    """Tokens of every layer that stay resident during a call: all or, if its scores need their room, none."""
    staged = call.begin > resident
    return resident if block_tokens(shape, tiers, call.stop, call.rows, resident, staged, bits) else 0
