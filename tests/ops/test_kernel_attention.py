"""Attention over pages by Triton's kernels, against torch."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_near
from kernel_examples import (
    BITS,
    empty_pool,
    encoded,
    fit_of,
    moved,
)

from tieredkv.codecs import codec_for
from tieredkv.ops import torch_ops
from tieredkv.ops.base import Ops, Pages

pytestmark = pytest.mark.interpreter


EVERY_SHAPE = [(3, 3, 64, 8, 21, 1), (2, 7, 80, 12, 5, 1), (1, 1, 128, 32, 7, 1), (1, 16, 96, 8, 9, 1),
               (1, 7, 256, 8, 5, 1), (2, 2, 32, 8, 9, 5), (1, 7, 64, 8, 3, 12), (1, 3, 128, 48, 3, 1)]  # fmt: skip
"""The last has pages longer than what a program reads at a time."""
SHAPES_OF_DTYPE = [
    (dtype, *shape)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for shape in EVERY_SHAPE
    if torch.cuda.is_available() or dtype == torch.float32 or shape in ((2, 7, 80, 12, 5, 1), (2, 2, 32, 8, 9, 5))
]
"""In the interpreter a shape does the same in every dtype: the others are tried with a padded shape, of one row and of
several. A compiled kernel is another one for each."""


@BITS
@pytest.mark.parametrize(("dtype", "heads", "group", "d", "c", "columns", "rows"), SHAPES_OF_DTYPE)
def test_attention_over_ragged_pages(kernels, device, bits, dtype, heads, group, d, c, columns, rows):
    fit, codec = fit_of(bits, heads, d), codec_for(bits, c, d, dtype)
    tokens = torch.randn(2, heads, columns * c, d)
    if bits == 8:
        tokens *= fit.channels.transpose(0, 1).unsqueeze(2)
    elif bits == 4:
        tokens += fit.centre.transpose(0, 1).unsqueeze(2)
    pages = Pages(codec, encoded(codec, *tokens.to(dtype), fit).flatten(0, 1), fit if codec.needs_fit else None)
    table = torch.stack([head * columns + torch.randperm(columns) for head in range(heads)]).int()
    lengths = torch.full((heads, columns), c, dtype=torch.int32)
    lengths[:, 2], lengths[0, 1] = 3, 0
    query = torch.randn(heads * group, rows, d).to(dtype)
    given = [part.to(device) for part in (query, table, lengths)]
    on_device = moved(pages, device)
    out, lse = kernels.paged_attention(given[0], on_device, *given[1:], d**-0.5, 8)
    want, want_lse = torch_ops.paged_attention(query, pages, table, lengths, d**-0.5, 8)
    assert_near(out.cpu(), want, dtype)
    assert_near(lse.cpu(), want_lse, dtype)
    if rows == 1:
        assert_pages_alike(kernels, on_device, given, lengths, dtype)


def assert_pages_alike(kernels: Ops, pages: Pages, given: list[torch.Tensor], lengths, dtype) -> None:
    """The log-sum-exp of each page as torch has it; pages, given: on the device. The output is as without."""
    query, table, _ = given
    rest = *given[1:], query.shape[-1] ** -0.5, 8
    got, want = (torch.full((len(query), table.shape[1] + 3), 7.0, device=query.device) for _ in range(2))
    out, _ = kernels.paged_attention(query, pages, *rest, got)
    assert torch.equal(out, kernels.paged_attention(query, pages, *rest)[0])
    narrow, _ = kernels.paged_attention(query, pages, *rest, dtype=dtype)
    assert narrow.dtype == dtype
    assert_near(narrow.float(), out, dtype)  # the interpreter cuts bfloat16 off
    torch_ops.paged_attention(query, pages, *rest, want)
    counts = torch.nn.functional.pad(lengths > 0, (0, 3), value=True).repeat_interleave(len(query) // len(table), 0)
    assert bool((got.cpu()[~counts] < -1e30).all())
    assert_near(got.cpu()[counts], want.cpu()[counts], dtype)


def filled_pool(bits: int, slots: int, device: torch.device) -> Pages:
    """Pages of four tokens of one head."""
    pages = empty_pool(bits, slots, 1, 4, 16, torch.float32, device)
    pages.records.copy_(encoded(pages.codec, *torch.randn(2, 1, slots * 4, 16), fit_of(bits, 1, 16))[0])
    return pages


@BITS
def test_what_lies_beyond_a_pages_length_is_not_read(kernels, device, bits):
    pages, query = filled_pool(bits, 3, device), torch.randn(2, 1, 16, device=device)
    table, lengths = torch.tensor([[0, 1, 2]], device=device).int(), torch.tensor([[4, 2, 0]], device=device).int()
    want, want_lse = kernels.paged_attention(query, pages, table, lengths, 1.0, 8)
    for field in pages.codec.fields(pages.records):
        field[1, 2:] = field[2] = float("nan") if field.dtype.is_floating_point else torch.iinfo(field.dtype).min
    out, lse = kernels.paged_attention(query, pages, table, lengths, 1.0, 8)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


@BITS
@pytest.mark.parametrize("half", [0, 1], ids=["key", "value"])
def test_a_token_that_is_nan_makes_the_output_nan(kernels, device, bits, half):
    pages = filled_pool(bits, 2, device)
    fields = [field for field in pages.codec.fields(pages.records) if field.dtype.is_floating_point]
    fields[half][1, 2] = float("nan")
    table, lengths = torch.tensor([[0, 1]], device=device).int(), torch.tensor([[4, 4]], device=device).int()
    out, _ = kernels.paged_attention(torch.randn(2, 1, 16, device=device), pages, table, lengths, 1.0, 8)
    assert out.isnan().all()
