"""The generator: the same seed gives the same pixels, and every answer is true of the scene."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from tieredkv.tiny.bitmaps import COLOURS, LETTERS, SHAPES
from tieredkv.tiny.draw import SIZE
from tieredkv.tiny.scene import NAMED_BY, Scene, chain_question, colour_question, make_scene, questions
from tieredkv.tiny.video import SCALE, write_video


@pytest.fixture(scope="module")
def scene() -> Scene:
    return make_scene(1_000_000, seconds=40, cards=8)


def test_the_same_seed_gives_the_same_pixels(scene: Scene) -> None:
    again = make_scene(1_000_000, seconds=40, cards=8)
    assert again == scene
    assert np.array_equal(again.frames(), scene.frames())


def test_another_seed_gives_another_scene(scene: Scene) -> None:
    assert make_scene(1_000_001, seconds=40, cards=8).cards != scene.cards


def test_frames_are_rendered_in_blocks_that_add_up(scene: Scene) -> None:
    blocks = list(scene.render())
    assert len(blocks) > 1
    assert all(block.shape[1:] == (SIZE, SIZE, 3) and block.dtype == np.uint8 for block in blocks)
    assert sum(map(len, blocks)) == scene.frame_count == 160


def test_pictures_differ_from_each_other() -> None:
    for pictures in (SHAPES, LETTERS):
        assert len(pictures) == 16
        assert len({picture.tobytes() for picture in pictures.values()}) == 16


def test_cards_do_not_overlap_and_have_distinct_shapes(scene: Scene) -> None:
    assert len({card.shape for card in scene.cards}) == 8
    spans = sorted((card.start_s, card.end_s) for card in scene.cards + scene.distractors)
    assert spans[-1][1] <= scene.seconds
    for (_, end), (start, _) in pairwise(spans):
        assert start - end >= 0.5


def test_a_card_is_on_screen_exactly_while_it_says_so(scene: Scene) -> None:
    without = Scene(scene.seed, scene.seconds, (), ())
    changed = (scene.frames() != without.frames()).any(axis=(1, 2, 3))
    shown = np.zeros(scene.frame_count, bool)
    for card in scene.cards + scene.distractors:
        shown[round(card.start_s * scene.fps) : round(card.end_s * scene.fps)] = True
    assert np.array_equal(changed, shown)


def test_letters_form_one_cycle_over_the_shapes(scene: Scene) -> None:
    shape, seen = scene.cards[0].shape, []
    for _ in scene.cards:
        seen.append(shape)
        shape = NAMED_BY[scene.card(shape).letter]
    assert shape == scene.cards[0].shape
    assert set(seen) == {card.shape for card in scene.cards}


def test_chain_answers_follow_the_cards(scene: Scene) -> None:
    start = scene.cards[2].shape
    question = chain_question(scene, start, 4)
    assert question.text == f"follow the {start} for 4 ?"
    assert len(question.words) == len(question.spans) == 8
    shape = start
    for letter, named, span in zip(question.words[::2], question.words[1::2], question.spans[::2], strict=True):
        card = scene.card(shape)
        assert (card.letter, NAMED_BY[letter]) == (letter, named)
        assert span == (card.start_s, card.end_s)
        shape = named


def test_colour_answers_are_the_cards_colour(scene: Scene) -> None:
    card = scene.cards[0]
    question = colour_question(scene, card.shape)
    assert question.text == f"what colour was the {card.shape} ?"
    assert question.words == (card.colour,)
    assert card.colour in COLOURS


def test_questions_repeat_with_the_seed_and_never_walk_the_cycle_twice() -> None:
    small = make_scene(1_000_002, seconds=20, cards=3)
    asked = questions(small, seed=5, count=12)
    assert asked == questions(small, seed=5, count=12)
    assert {question.kind for question in asked} == {"colour", "chain"}
    assert max(len(question.words) for question in asked) <= 2 * 3


def test_too_many_cards_are_refused_with_numbers() -> None:
    with pytest.raises(ValueError, match=r"12 cards need \d+ frames, the scene has 40"):
        make_scene(0, seconds=10, cards=12, distractors=0)
    with pytest.raises(ValueError, match="1 to 16 cards, asked for 17"):
        make_scene(0, seconds=100, cards=17)


def test_a_video_file_has_the_scenes_frames_at_the_scenes_times(scene: Scene, tmp_path) -> None:
    import av

    calls = []
    path = write_video(scene, tmp_path / "scene.mp4", progress=lambda *done: calls.append(done))
    assert [entry.name for entry in tmp_path.iterdir()] == ["scene.mp4"]
    assert calls[-1] == (scene.frame_count, scene.frame_count)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == Fraction(4)
        assert stream.codec_context.name == "h264"
        decoded = list(container.decode(video=0))
    assert [frame.time for frame in decoded] == [i / scene.fps for i in range(scene.frame_count)]
    pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])
    assert pixels.shape[1:] == (SIZE * SCALE, SIZE * SCALE, 3)
    small = pixels[:, SCALE // 2 :: SCALE, SCALE // 2 :: SCALE].astype(int)
    assert np.abs(small - scene.frames()).mean() < 4


def test_a_failed_write_leaves_no_file(scene: Scene, tmp_path) -> None:
    def fail(done: int, total: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_video(scene, tmp_path / "scene.mp4", progress=fail)
    assert list(tmp_path.iterdir()) == []
