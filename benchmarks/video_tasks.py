"""Questions about new synthetic videos for the tiny models, as tokens: chains, lookups, second questions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from replay import ReplayedQuestion, VideoReader

from tieredkv.config import TierConfig
from tieredkv.models import families
from tieredkv.models.chat_template import ChatTemplate
from tieredkv.tiny import scene as scenes
from tieredkv.tiny.evaluate import TOKENS_PER_SECOND, prepare
from tieredkv.video.frames import Sampled

FIRST_SEED = 1_300_000
"""Seeds from here on are used neither in training nor by other benchmarks."""
CARDS, HOPS = 16, 6
END = "<|im_end|>"


def read_video(model: Any, processor: Any, tokens: int, number: int, tiers: TierConfig) -> tuple[VideoReader, Any]:
    """A reader of video `number`, of `tokens` visual tokens, and the scene that it shows."""
    scene = scenes.make_scene(FIRST_SEED + tokens * 1000 + number, tokens / TOKENS_PER_SECOND, CARDS)
    family = families.video_family(model.config)
    template = ChatTemplate(family, processor)
    frames = scene.frames()
    sampled = Sampled(len(frames), *frames.shape[1:3], scene.fps, 0.0, scene.seconds)
    head, _ = template.around_video([("what ?", None)])
    head_ids = template.head_ids(model.config, head, sampled)[0].tolist()
    features = family.encode(model, prepare(processor, frames, "what ?"))
    return VideoReader(model, head_ids, features, template.grid(model.config, sampled), tiers), scene


def ask(processor: Any, family: Any, scene: Any, count: int) -> list[ReplayedQuestion]:
    """`count` chains of six hops, lookups, and chains that follow another question, all about different cards."""
    template = ChatTemplate(family, processor)
    rng = np.random.default_rng((scene.seed, 9))
    shapes = [card.shape for card in scene.cards]
    chains = [scenes.chain_question(scene, str(shape), HOPS) for shape in rng.permutation(shapes)[:count]]
    lookups = [scenes.colour_question(scene, str(shape)) for shape in rng.permutation(shapes)[:count]]
    result = [_question(template, "chain", one) for one in chains]
    result += [_question(template, "lookup", one) for one in lookups]
    for earlier, later in zip(lookups, chains, strict=True):
        result.append(_second(template, earlier, later))
    return result


def _question(template: ChatTemplate, task: str, asked: scenes.SceneQuestion) -> ReplayedQuestion:
    _, tail = template.around_video([(asked.text, None)])
    answer = template.tokenize(" ".join(asked.words) + END)[0].tolist()
    prompt = template.tail_ids(tail, (), None)[0].tolist()  # these models write nothing after a step
    if task == "lookup":  # the word comes from the prefill, so only the end is scored
        return ReplayedQuestion(task, prompt, answer, [1], [1])
    scored = list(range(1, len(asked.words)))
    return ReplayedQuestion(task, prompt, answer, scored, [place // 2 + 1 for place in scored])


def _second(template: ChatTemplate, earlier: scenes.SceneQuestion, later: scenes.SceneQuestion) -> ReplayedQuestion:
    """`later`, in the conversation after `earlier` and its true answer."""
    first = _question(template, "lookup", earlier)
    _, whole = template.around_video([(earlier.text, " ".join(earlier.words)), (later.text, None)])
    ids = template.tail_ids(whole, (), None)[0].tolist()
    asked = first.prompt_ids
    answered = first.answer_ids[:-1]
    assert ids[: len(asked) + len(answered)] == [*asked, *answered]
    rest = ids[len(asked) + len(answered) :]
    return replace(_question(template, "second", later), prompt_ids=rest, before=(asked, answered))
