"""Prompts as text and tokens: the processor's chat template around videos and pictures, and what is written inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from tieredkv.errors import PromptError, UnsupportedModelError, VideoError, first_line
from tieredkv.models.families.base import Kind, Positions, Slices, VideoFamily, VideoGrid
from tieredkv.models.families.pictures import PICTURES
from tieredkv.models.prompts import check_system
from tieredkv.video.frames import Sampled
from tieredkv.video.subtitles import Cue, subtitle_lines
from tieredkv.video.timecodes import shown

Turn = tuple[str, str | None]
"""A question and its answer; None for the answer that the model is to write."""


class ChatTemplate:
    """The chat template of a processor, cut at the placeholders of what a prompt shows."""

    def __init__(
        self,
        family: VideoFamily,
        processor: Any,
        positions: Positions = "published",
        system: str | None = None,
        media: Sequence[Kind] = ("video",),
    ) -> None:
        """system: the system prompt of every conversation; None: the template's own, if it has one. media: what every
        prompt shows, in order.

        Raises `UnsupportedModelError` unless this is the processor of a video model, and `PromptError` for a system
        prompt that is no text.
        """
        check_system(system)
        for part in ("video_processor", "tokenizer", "apply_chat_template"):
            if not hasattr(processor, part):
                kind = type(processor).__name__
                raise UnsupportedModelError(f"processor is a {kind} without {part}: give the model's AutoProcessor.")
        self.family, self.processor, self.positions, self.system = family, processor, positions, system
        self.media = tuple(media)
        self.families = tuple(_adapter(family, kind) for kind in media)
        """The adapter of each medium."""
        if len(media) > 1 and family.alone:
            raise UnsupportedModelError(
                f"models of type {family.model_types[0]!r} take one video in a prompt here, not {len(media)} media: "
                f"{family.alone}."
            )
        self._source = chat_template(processor)
        self.placeholder = family.placeholder(processor, positions)
        token = family.visual_token(processor)
        self.visual_id: int = processor.tokenizer.convert_tokens_to_ids(token)
        """The token id that stands for each visual token."""
        if self.visual_id is None or self.visual_id == processor.tokenizer.unk_token_id:
            raise UnsupportedModelError(
                f"the tokenizer does not know {token!r}, which stands for the video: give the model's own processor."
            )

    def showing(self, media: Sequence[Kind]) -> ChatTemplate:
        """The same, for prompts that show other media. Raises `UnsupportedModelError` if the model cannot take them."""
        return ChatTemplate(self.family, self.processor, self.positions, self.system, media)

    def of_each(self) -> tuple[ChatTemplate, ...]:
        """For each medium, the template by which its tokens are counted, as those of a video of its own."""
        return tuple(ChatTemplate(each, self.processor, self.positions, self.system) for each in self.families)

    @property
    def visual_ids(self) -> tuple[int, ...]:
        """`visual_id` of each medium."""
        return tuple(each.visual_id for each in self.of_each())

    def around_video(self, turns: Sequence[Turn]) -> tuple[str, str]:
        """The text before the video and after it, in a conversation whose last answer is None; of several, the text
        before the first and after the last. See `texts`."""
        head, *_, tail = self.texts(turns)
        return head, tail

    def texts(self, turns: Sequence[Turn]) -> tuple[str, ...]:
        """The text before each medium and after the last, in a conversation whose last answer is None.

        What a template writes before the video may change with the date. Raises `PromptError` for a question that
        contains the placeholder or would be written before the video, and `UnsupportedModelError` for a template that
        is missing, fails, does not write each medium once and the last question, or does not write the system prompt
        before the video.
        """
        reserved = {
            token
            for each in (self.family, *self.families)
            for token in (each.placeholder(self.processor, self.positions), each.visual_token(self.processor))
        }
        prompts = [("prompt", question) for question, _ in turns]
        for what, given in (*prompts, ("system prompt", self.system or "")):
            for token in reserved:
                if token in given:
                    raise PromptError(f"the {what} contains {token!r}, which stands for the video: leave it out.")
        text = self._written(turns)
        texts = self._cut(text)
        if texts is None:
            what = "the video" if self.media == ("video",) else f"each of {len(self.media)} media, in their order"
            raise UnsupportedModelError(f"the processor's chat template writes no placeholder for {what}.")
        head, *_, tail = texts
        self._check_system(head, tail)
        # Tokens of a video in the text before the first one are known to be harmless where there is only one.
        if any(token in each for token in reserved for each in ([tail] if len(texts) == 2 else texts)):
            raise UnsupportedModelError(
                "the processor's chat template, or an earlier answer, writes the video's placeholder a second time."
            )
        *earlier, (question, _) = turns
        other = self._written([*earlier, (f"{question}, or another?", None)])
        # Rendered again, because a template may write the time.
        again, asked = self._cut(self._written(turns)), self._cut(other)
        if again is not None and (asked is None or _moved(asked[:-1], texts[:-1], again[:-1])):
            raise PromptError("the chat template puts the prompt before the video: that is not supported.")
        if text == other:
            raise UnsupportedModelError(
                "the processor's chat template leaves the question out: give one that writes every turn of a "
                "conversation."
            )
        return texts

    def _cut(self, text: str) -> tuple[str, ...] | None:
        """A prompt's text before each medium and after the last; None if a placeholder is missing."""
        texts, rest = [], text
        for each in self.families:
            before, placeholder, rest = rest.partition(each.placeholder(self.processor, self.positions))
            if not placeholder:
                return None
            texts.append(before)
        return (*texts, rest)

    def continues(
        self, turns: Sequence[Turn], ids: torch.Tensor, times: Sequence[float], slices: Slices | None
    ) -> bool:
        """Whether the next prompt of a conversation begins with all of this one. ids: `tail_ids` of this one, with
        these times and slices.

        It does not where the template leaves the marks of thinking out of all answers but the last, or cannot write
        another turn.
        """
        *earlier, (question, _) = turns
        try:
            _, tail = self.around_video([*earlier, (question, "?"), ("?", None)])
        except (PromptError, UnsupportedModelError):  # raised once there is such a turn
            return False
        following = self.tail_ids(tail, times, slices)[:, : ids.shape[1]]
        return torch.equal(following, ids)

    def _check_system(self, head: str, tail: str) -> None:
        """Raise `UnsupportedModelError` unless the system prompt is in `head`, as given."""
        if self.system is None:
            return
        kind, text = type(self.processor).__name__, self.system.strip()
        if text in head:
            return
        where = "writes the system prompt after the video" if text in tail else "does not write the system prompt"
        raise UnsupportedModelError(f"the chat template of this {kind} {where}: leave system= out.")

    def _written(self, turns: Sequence[Turn]) -> str:
        if self.system is None:
            return self._rendered(turns, [])
        parts = _content(self.system)
        text = self._rendered(turns, [{"role": "system", "content": parts}])
        if str(parts) in text:  # a template that takes a system prompt as text, and writes a list as Python does
            text = self._rendered(turns, [{"role": "system", "content": self.system}])
        return text

    def _rendered(self, turns: Sequence[Turn], before: Sequence[dict[str, Any]]) -> str:
        messages = list(before)
        for number, (question, answer) in enumerate(turns):
            video = [] if number else [{"type": kind} for kind in self.media]
            messages.append({"role": "user", "content": [*video, *_content(question)]})
            if answer is not None:
                messages.append({"role": "assistant", "content": _content(answer)})
        template = self._source
        given = {} if template is None else {"chat_template": template}
        try:
            return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **given)
        except Exception as error:  # noqa: BLE001  a template is a program, and may raise anything
            if template is None:
                raise UnsupportedModelError(
                    "the processor has no chat template: copy chat_template.jinja from the base model, or set "
                    "processor.chat_template."
                ) from None
            raise UnsupportedModelError(
                f"the processor's chat template fails ({first_line(error)}): correct it, or set "
                "processor.chat_template to that of the base model."
            ) from None

    def question_tokens(self, tail: str, question: str) -> int:
        """Tokens from a prompt's last question to its end. tail: its text after the video, from `around_video`."""
        mark = "(the question)"
        after = self.around_video([(mark, None)])[1].rpartition(mark)[2]
        begin = tail.rfind(question.strip(), 0, len(tail) - len(after))
        return self.tokenize(tail[max(0, begin) :]).shape[1]

    def head_ids(self, config: Any, head: str, video: Sampled) -> torch.Tensor:
        """Token ids `(1, n)` of everything before the first step. head: from `around_video`."""
        return self.text_ids(config, 0, head, video)

    def text_ids(
        self,
        config: Any,
        number: int,
        text: str,
        video: Sampled,
        before: tuple[Sequence[float], Slices | None] = ((), None),
    ) -> torch.Tensor:
        """Token ids `(1, n)` of everything between the medium before the `number`-th and its own first step.

        text: between the two, from `texts`. before: times of the last step of the medium before, and its slices.
        """
        processor, family = self.processor, self.families[number]
        times = video.times(0, family.step_frames(config))
        text += family.numbered_opening(processor, number, video.frames, video.seconds, times)
        if family.between(processor, 1, times) is None:
            text = self._with_cues(text, video.cues, 0, times, timed=True)
        else:
            text = self._with_cues(text, video.cues_of(0, len(times)), 0, times)
        if number:
            earlier = self.families[number - 1]
            text = earlier.after(processor, *before) + earlier.ending(processor) + text
        return self.tokenize(text)

    def context_tokens(self, config: Any, texts: Sequence[str], media: Sequence[tuple[Sampled, VideoGrid]]) -> int:
        """Tokens up to the end of the last medium, as far as is known before decoding. texts: before each."""
        tokens = 0
        before: tuple[Sequence[float], Slices | None] = ((), None)
        for number, (text, (video, grid)) in enumerate(zip(texts, media, strict=True)):
            tokens += self.text_ids(config, number, text, video, before).shape[1] + grid.tokens
            before = video.times(grid.steps - 1, grid.frames_per_step), grid.slices
        return tokens

    def between_ids(
        self, step: int, times: Callable[[int], Sequence[float]], slices: Slices | None, cues: Sequence[Cue] = ()
    ) -> tuple[int, ...] | None:
        """Token ids between a step and the one before; None for a family that never writes any.

        times: of the frames of a step, in seconds. cues: subtitles that begin in this step.
        """
        text = self.family.between(self.processor, step, times(step))
        if text is None:
            return None
        if step == 0:
            return ()
        text = self.family.after(self.processor, times(step - 1), slices) + text
        text = self._with_cues(text, cues, step, times(step))
        return tuple(self.processor.tokenizer(text, add_special_tokens=False).input_ids)

    def _with_cues(self, text: str, cues: Sequence[Cue], step: int, times: Sequence[float], timed: bool = False) -> str:
        """The text before a step with subtitles in it, just before the text that introduces the step's pictures.

        timed: with their times, where the family does not write text between steps and all stand before the first.
        Raises `UnsupportedModelError` where no text can stand, and `PromptError` for a cue with a token of the model's.
        """
        if not cues:
            return text
        introduction = self.family.introduction(self.processor, step, times)
        if introduction is None or not text.endswith(introduction):
            raise UnsupportedModelError(
                f"models of type {self.family.model_types[0]!r} take no subtitles here: no text can stand between "
                "their frames. Leave subtitles out, or put the words into the question."
            )
        reserved = self.processor.tokenizer.get_added_vocab().keys() | {self.placeholder}
        for cue in cues:
            if token := next((token for token in reserved if token in cue.text), None):
                raise PromptError(
                    f"the subtitles contain {token!r} at {shown(cue.start)}: it has a meaning to the model."
                )
        return text.removesuffix(introduction) + subtitle_lines(cues, timed) + introduction

    def tail_ids(self, tail: str, times: Sequence[float], slices: Slices | None) -> torch.Tensor:
        """Token ids `(1, n)` of everything after the last medium. tail: from `texts`. times: of the last step."""
        family, processor = self.families[-1], self.processor
        return self.tokenize(family.after(processor, times, slices) + family.ending(processor) + tail)

    def grid(self, config: Any, video: Sampled) -> VideoGrid:
        """The tokens expected of a video. Raises as `frames`."""
        grid = self.frames(config, video)

        def times(step: int) -> list[float]:
            return video.times(step, grid.frames_per_step)

        between = [
            self.between_ids(step, times, grid.slices, video.cues_of(step, grid.frames_per_step))
            for step in range(grid.steps)
        ]
        written = () if grid.steps == 0 or between[0] is None else tuple(ids or () for ids in between)
        return replace(grid, between=written)

    def frames(self, config: Any, video: Sampled) -> VideoGrid:
        """The same without the text between steps.

        Raises `VideoError` if the processor refuses frames of this size, and `OptionError` if it cannot make them as
        small as `max_pixels`.
        """
        family, step_frames = self.family, self.family.step_frames(config)
        try:
            steps, rows, columns = family.frame_grid(config, self.processor, video)
            slices = family.slices(config, self.processor, video)
        except UnsupportedModelError:
            raise
        except ValueError as error:
            raise refused(video, error) from None
        closing = family.closing_tokens(config)
        return VideoGrid(steps, rows, columns, step_frames / video.fps, (), closing, step_frames, slices=slices)

    def tokenize(self, text: str) -> torch.Tensor:
        """Token ids `(1, n)`. Raises `PromptError` for text that the tokenizer refuses."""
        try:
            ids = self.processor.tokenizer(text, add_special_tokens=False).input_ids
        except Exception as error:  # noqa: BLE001  tokenizers have no exception class of their own
            raise PromptError(
                f"the tokenizer refuses the prompt, or what the chat template adds to it ({first_line(error)})."
            ) from None
        return torch.tensor([ids], dtype=torch.long, device="cpu")

    def text(self, token_ids: list[int]) -> str:
        """The text of generated tokens, without special ones."""
        return self.processor.tokenizer.decode(token_ids, skip_special_tokens=True).strip()


def _adapter(family: VideoFamily, kind: Kind) -> VideoFamily:
    """The adapter of videos or of still pictures. Raises `UnsupportedModelError` if the family takes none."""
    if kind == "video":
        return family
    if (pictures := PICTURES.get(family.model_types[0])) is None:
        raise UnsupportedModelError(
            f"still pictures are not supported for models of type {family.model_types[0]!r}: leave them out, or give "
            "each as a video of one frame, as in Video('map.png')."
        )
    return pictures


def _moved(asked: tuple[str, ...], texts: tuple[str, ...], again: tuple[str, ...]) -> bool:
    """Whether another question changes a text that stays the same for the same question."""
    return any(other != text == same for other, text, same in zip(asked, texts, again, strict=True))


def _content(text: str) -> list[dict[str, str]]:
    """Text as the content of a message."""
    return [{"type": "text", "text": text}]


def refused(video: Sampled, error: ValueError) -> VideoError:
    """The error to raise when a processor refuses frames."""
    return VideoError(f"the model's processor refuses frames of {video.width}x{video.height}: {error}")


def chat_template(processor: Any) -> str | None:
    """The chat template in use, the one named "default" if there are several; None if the model comes without one.

    Raises `UnsupportedModelError` for anything that is not a template.
    """
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if isinstance(template, list):  # the form of old files
        template = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
    if isinstance(template, dict):
        if "default" not in template:
            raise UnsupportedModelError(
                f"the processor's chat templates are named {', '.join(map(str, template)) or 'nothing'}, and none "
                "'default': set processor.chat_template to one of them."
            )
        template = template["default"]
    if template is not None and not isinstance(template, str):
        raise UnsupportedModelError(f"the processor's chat template is a {type(template).__name__}: give it as text.")
    return template or None
