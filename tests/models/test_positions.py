"""Position ids by the published rule and by transformers, computed in chunks."""

from __future__ import annotations

import pytest
import torch

from tieredkv.models.families.base import VideoGrid
from tieredkv.models.families.qwen2_5_vl import Qwen25VL

GRIDS = [VideoGrid(1, 2, 2, 0.5), VideoGrid(30, 3, 5, 0.5), VideoGrid(9, 12, 20, 1.3), VideoGrid(700, 1, 1, 2.0)]


def published_one_by_one(model, head: int, video: VideoGrid, tail: int) -> torch.Tensor:
    """The rule token by token: text counts up; a visual token has its step's time, its row and its column."""
    ids = [[n] * 3 for n in range(head)]
    rate = model.config.vision_config.tokens_per_second
    for step in range(video.steps):
        time = int(torch.tensor(float(step)) * video.seconds_per_step * rate)
        ids += [
            [head + time, head + row, head + column] for row in range(video.rows) for column in range(video.columns)
        ]
    first = max(max(place) for place in ids) + 1
    ids += [[first + n] * 3 for n in range(tail)]
    return torch.tensor(ids).T


@pytest.mark.parametrize("video", GRIDS, ids=str)
@pytest.mark.parametrize("head", [1, 15])
def test_published_positions_follow_the_rule(video_model, video, head):
    total = head + video.tokens + 9
    got = Qwen25VL().positions(video_model, head, video, 0, total, "published")
    assert torch.equal(got, published_one_by_one(video_model, head, video, 9))


@pytest.mark.parametrize("rule", ["published", "stock"])
@pytest.mark.parametrize("video", GRIDS, ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_positions_in_chunks_equal_those_of_the_whole(video_model, rule, video, chunk):
    if chunk == 1 and video.tokens > 100:
        chunk = 97
    family, total = Qwen25VL(), 15 + video.tokens + 9
    whole = family.positions(video_model, 15, video, 0, total, rule)
    parts = [
        family.positions(video_model, 15, video, begin, min(begin + chunk, total), rule)
        for begin in range(0, total, chunk)
    ]
    assert torch.equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("rule", ["published", "stock"])
def test_positions_do_not_depend_on_steps_to_come(video_model, rule):
    from dataclasses import replace

    video, family = GRIDS[1], Qwen25VL()
    whole = family.positions(video_model, 15, video, 0, 15 + video.tokens, rule)
    for steps in (1, 8, 29):
        so_far = replace(video, steps=steps)
        stop = 15 + so_far.tokens
        assert torch.equal(family.positions(video_model, 15, so_far, 0, stop, rule), whole[:, :stop])


@pytest.mark.parametrize("video", GRIDS[:3], ids=str)
def test_stock_positions_are_those_of_the_installed_transformers(video_model, video):
    kinds = torch.tensor([[0] * 15 + [2] * video.tokens + [0] * 9])
    theirs, _ = video_model.model.get_rope_index(
        input_ids=torch.zeros_like(kinds),
        mm_token_type_ids=kinds,
        video_grid_thw=torch.tensor([[video.steps, 2 * video.rows, 2 * video.columns]]),
        second_per_grid_ts=torch.tensor([video.seconds_per_step]),
    )
    got = Qwen25VL().positions(video_model, 15, video, 0, kinds.shape[1], "stock")
    assert torch.equal(got, theirs[:, 0])
