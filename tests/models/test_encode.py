"""The rate at which a video is read for a model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tieredkv.config import DEFAULT_FPS
from tieredkv.models.encode import at_processor_rate
from tieredkv.video.sampling import Sampling


@pytest.mark.parametrize(("given", "own", "rate"), [(4, 3, 4), (None, 3, 3), (None, None, DEFAULT_FPS)])
def test_the_processors_rate_is_used_where_none_is_given(given, own, rate):
    processor = SimpleNamespace(video_processor=SimpleNamespace(fps=own))
    assert at_processor_rate(Sampling(given, max_frames=5), processor) == Sampling(rate, max_frames=5)
