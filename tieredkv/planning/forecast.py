"""plan: the memory and copies that a prompt would need, before a weight is loaded or a frame decoded.

Bytes come from the functions that size the real cache, so a plan refuses what a session would refuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from typing import Any

from tieredkv.config import TierConfig, tier_config
from tieredkv.errors import (
    BudgetError,
    OptionError,
    VideoError,
    check_value,
    check_whole,
    is_number,
)
from tieredkv.memory import limits
from tieredkv.memory.disk_tier import temporary_folder
from tieredkv.memory.units import as_gib, largest
from tieredkv.models import families, loading
from tieredkv.models.kv_shape import KVShape
from tieredkv.models.long_context import LongContext, trained_tokens
from tieredkv.planning import decode_plan, disk_plan, forecast_bytes, host_plan, sizes
from tieredkv.planning.admission import FEWER_TOKENS, Request, check_memory, smallest_cap_bytes
from tieredkv.planning.advice import Advice
from tieredkv.planning.card_memory import LEAST_KV_BYTES, CardMemory, working_bytes
from tieredkv.planning.cards import find_card
from tieredkv.planning.links import find_link
from tieredkv.planning.planned import PlannedMedia, PlannedModel, PlannedVideo
from tieredkv.planning.prefill_plan import question_rows, untiered_prefill_bytes
from tieredkv.planning.rates import Rates
from tieredkv.planning.report import BitsChoice, MemoryPlan
from tieredkv.planning.step_forecast import StepForecast
from tieredkv.planning.step_time import step_time, weights_only_ms
from tieredkv.planning.step_works import model_layers, step_waits, step_works
from tieredkv.planning.weight_bytes import Weights
from tieredkv.video.download import download
from tieredkv.video.media import Medium, check_media, check_subtitles
from tieredkv.video.sampling import Sampling
from tieredkv.video.urls import is_url

HEAD_TOKENS = 15
"""Tokens of text before the video without a processor: those of Qwen2.5-VL's chat template."""


def plan(
    model: Any,
    video_or_tokens: Any,
    *,
    gpu_kv_gb: float | None = None,
    host_kv_gb: float | None = None,
    host_kv_bits: int | None = None,
    tiers: TierConfig | None = None,
    processor: Any = None,
    weights: str | None = None,
    fps: float | None = None,
    source_fps: float | None = None,
    max_frames: int | None = None,
    start: float = 0.0,
    end: float | None = None,
    max_pixels: int | None = None,
    skip_damaged: bool = False,
    subtitles: str | None = None,
    fit: bool = False,
    allow_url: bool = False,
    question_tokens: int = 64,
    max_new_tokens: int = 256,
    static_share: float = 0.0,
    system: str | None = None,
    link: str | float = "pcie4x16",
    card: str | float | None = None,
    **options: Any,
) -> MemoryPlan:
    """Forecast one video and one question: bytes by tier and purpose, and the time copies would take.

    model: a transformers config or model, a local path or a hub id; from the last two only the config is read. Video
    models, and text models under `TieredCache`. A config without a dtype counts as bfloat16; weights are counted as its
    `quantization_config` says. video_or_tokens: a number of visual tokens (for a text model, of tokens before the
    question), or a video, or several, as in `open_session`, opened but not decoded; needs the model's processor.
    question_tokens: text after the video, the chat template's end included. system: a system prompt, counted too.
    static_share: share of the heads assumed static, unless the policy fixes it. link: a name in `LINKS`, or GB/s; card:
    a name, or GB/s (`find_card`). With a card a step's time is predicted, and what it attends to is limited as
    `step_overhead` says. weights: as in `open_session`. tiers, or its fields as further keywords. Of a card known by
    name the default of gpu_kv_gb is what is left of its memory. fit: as in `open_session`; `MemoryPlan.fit` says what
    it chose.

    Raises `BudgetError` when a tier is too small, naming the smallest change that fits; `VideoError`,
    `UnsupportedModelError` or `OptionError` for bad input.
    """
    default_cap = tiers is None and gpu_kv_gb is None
    settings = tier_config(
        tiers, {"gpu_kv_gb": gpu_kv_gb, "host_kv_gb": host_kv_gb, "host_kv_bits": host_kv_bits, **options}
    )
    link, link_speed = find_link(link if settings.link_gb_s is None else settings.link_gb_s)
    on = None if card is None else find_card(card)
    for name, value in (("question_tokens", question_tokens), ("max_new_tokens", max_new_tokens)):
        check_whole(name, value)
    share = is_number(static_share) and 0 <= static_share <= 1
    check_value(share, "static_share", static_share, "a share between 0 and 1")

    source = PlannedModel.of(model, weights)
    shape = source.shape
    folder = None if source.is_text else temporary_folder()
    video: PlannedVideo | None = None
    shown: PlannedMedia | None = None
    if system is not None and source.is_text:
        raise OptionError("system= is for models that take video: count the system prompt as tokens.")
    sampling = Sampling(fps, source_fps, max_frames, start, end, max_pixels, skip_damaged, subtitles, fit)
    if isinstance(video_or_tokens, int):
        check_whole("visual tokens", video_or_tokens)
        if given := sampling.given():
            raise OptionError(f"{given[0]} does not apply to a number of tokens: give a video, or leave it out.")
        visual = video_or_tokens
        if processor is None and system is not None:
            processor = loading.load_processor(source.path)
    else:
        families.video_family(source.config)  # raises for a text model
        media = check_media(video_or_tokens, allow_url)
        check_subtitles(media, sampling)
        media = tuple(map(_local, media))
        if any(isinstance(each.source, Iterator) for each in media):
            raise VideoError("a plan would use up the iterator: give its frames as a list, or a number of tokens.")
        if processor is None:
            processor = loading.load_processor(source.path)
        if len(media) == 1 and media[0].kind == "video":
            video_or_tokens, sampling = media[0].source, media[0].sampling(sampling)
            video = PlannedVideo.open(source, processor, video_or_tokens, sampling, system)
        else:
            shown = PlannedMedia.open(source, processor, media, sampling, system)
    weights_of = Weights.of(source.config, source.dtype, source.loaded)
    weighs = weights_of.totals()

    def working(video: PlannedVideo | None) -> int:
        given = video or shown
        vision = 0 if source.is_text else None if given is None else given.encode_bytes(settings)
        return working_bytes(source.config, shape, settings, vision)

    def card_memory(video: PlannedVideo | None) -> CardMemory | None:
        if on is None or on.memory_gib is None:
            return None
        return CardMemory(on, weighs["decoder_bytes"] + weighs["vision_bytes"], working(video))

    def advice(video: PlannedVideo) -> Advice:
        memory = card_memory(video)
        return Advice(
            video.film(question_tokens),
            shape,
            settings,
            question_tokens,
            max_new_tokens,
            limits.available_host_bytes(),
            card_bytes=None if memory is None else memory.left_bytes,
            folder=folder,
            trained=trained_tokens(source.config),
        )

    if default_cap and (memory := card_memory(video)) is not None:
        if memory.default_cap == 0:
            memory.check(LEAST_KV_BYTES, LEAST_KV_BYTES, source.smaller_weights)
        settings = replace(settings, gpu_kv_gb=memory.default_cap)
    fitting = None
    if video is not None and fit:
        chosen, fitting = advice(video).fit(sampling)
        video = PlannedVideo.open(source, processor, video_or_tokens, chosen, system)
    if video is not None:
        visual = video.grid.visual_tokens
    elif shown is not None:
        visual = shown.visual_tokens
    inside = visual if video is None else video.grid.tokens
    if source.is_text:
        head = visual = 0
    elif shown is not None:
        head, inside = shown.head, shown.tokens - shown.head
    else:
        head = HEAD_TOKENS if processor is None else source.head_tokens(processor, video, system)
    text = head + question_tokens
    prompt = text + inside
    LongContext(source.config).check(0, prompt + max_new_tokens)

    bits, available = host_plan.prompt_bits(shape, settings, prompt), limits.available_host_bytes()
    host = sizes.host_bytes(shape, settings, prompt, bits)
    rates = None if on is None else Rates.of(on.gb_s, link_speed)
    leads = () if rates is None else weights_of.leads()

    def smaller(allowed: int) -> str:
        kind = "tokens" if source.is_text else "visual tokens"
        rest = [] if folder is None else disk_plan.to_disk(shape, settings, prompt, bits, allowed, folder)
        return _fewer_tokens(shape, settings, prompt, host, available, text, allowed, kind, rest)

    needs = Request(prompt, question_tokens, max_new_tokens)
    memory = card_memory(video)
    smallest = smallest_cap_bytes(shape, settings, needs.layout(settings), question_rows(settings, question_tokens))
    if memory is not None and default_cap and video is None:
        memory.check(smallest, smallest, source.smaller_weights)
    if video is not None:
        layout = advice(video).check(needs)
    else:
        fewer = FEWER_TOKENS if shown is not None else "give fewer tokens or a smaller max_new_tokens"
        layout = check_memory(shape, settings, needs, fewer, smaller, available=available, folder=folder)

    static = forecast_bytes.assumed_static(shape, settings, static_share)

    def decoding_at(bits: int) -> decode_plan.DecodePlan:
        scores, disk = static.double(), on_disk(bits) is not None
        waits = None
        if rates is not None:
            waits = step_waits(shape, settings, weighs["step_weight_bytes"], rates, leads, on_disk=disk)
        return decode_plan.plan_decode(
            shape, settings, layout, settings.cap_bytes, scores, static, host_bits=bits, waits=waits
        )

    def choice(bits: int) -> BitsChoice:
        try:
            copied = forecast_bytes.step_bytes(shape, settings, decoding_at(bits), static, bits)[1]
        except BudgetError:
            copied = None
        needed, stored = (of(shape, settings, prompt, bits) for of in (sizes.host_bytes, sizes.stored_bytes))
        disk = on_disk(bits)
        return BitsChoice(
            bits,
            needed if disk is None else disk.host_bytes,
            0 if disk is None else disk.disk_bytes,
            stored,
            copied,
        )

    def on_disk(bits: int) -> disk_plan.DiskPlan | None:
        return None if folder is None else disk_plan.disk_plan(shape, settings, prompt, bits)

    decoding, disk = decoding_at(bits), on_disk(bits)
    n_static, n_dynamic = int(static.sum()), int((~static).sum())
    c = settings.chunk_tokens
    recent = prompt - layout.recent_start + max_new_tokens
    static_pages, selected = int(decoding.pages[static].sum()), int(decoding.selected.sum())
    dynamic_pages = n_dynamic * layout.sink_chunks + selected
    decode = forecast_bytes.decode_bytes(shape, settings, decoding, static)
    prefill = forecast_bytes.prefill_bytes(shape, settings, prompt, question_tokens, bits)
    read, copied = forecast_bytes.step_bytes(shape, settings, decoding, static, bits)
    untiered = sizes.untiered_bytes(shape, prompt + max_new_tokens - 1, 1)
    weight_read, others = weighs["step_weight_bytes"], sum(untiered.values())
    works = step_works(shape, settings, decoding, static, bits, weight_read, others, leads=leads)
    memory_plan = MemoryPlan(
        model_type=source.config.model_type,
        dtype=str(source.dtype).removeprefix("torch."),
        shape=shape,
        **weighs,
        video=video.name if video is not None else None if shown is None else ", ".join(shown.names),
        frames=None if video is None else video.sampled.frames,
        frame_size=None if video is None else (video.sampled.height, video.sampled.width),
        fps=None if video is None else video.sampled.fps,
        tower_size=None if video is None else video.tower_size,
        fit=fitting,
        grid=None if video is None else (video.grid.steps, video.grid.rows, video.grid.columns),
        encode_batch=None if video is None else video.encode_batch(settings),
        visual_tokens=visual,
        video_text_tokens=inside - visual,
        prompt_tokens=prompt,
        new_tokens=max_new_tokens,
        full_bytes=prompt * shape.token_bytes,
        host_bytes=host if disk is None else disk.host_bytes,
        disk_bytes=0 if disk is None else disk.disk_bytes,
        recent_bytes=0 if disk is None else disk.memory_bytes,
        disk_folder=None if disk is None else str(folder),
        host_bits=bits,
        host_bits_reason=host_plan.reason(shape, settings, prompt),
        bits_choices=tuple(choice(each) for each in host_plan.possible_bits(shape)),
        file_bytes=sizes.stored_bytes(shape, settings, prompt, bits),
        snapshot_bytes=sizes.snapshot_bytes(shape, prompt),
        host_budget_bytes=limits.host_budget_bytes(settings.host_kv_gb, available),
        cap_bytes=settings.cap_bytes,
        prefill=prefill,
        decode=decode,
        untiered_prefill=untiered_prefill_bytes(shape, settings, prompt, question_tokens),
        untiered_decode=untiered,
        static_heads=n_static,
        dynamic_heads=n_dynamic,
        static_tokens=recent + c * static_pages // n_static if n_static else 0,
        dynamic_tokens=recent + c * dynamic_pages // n_dynamic if n_dynamic else 0,
        page_bits=decoding.page_bits,
        step_read_bytes=read,
        step_copy_bytes=copied,
        step=StepForecast(
            bound=decoding.bound,
            overhead=settings.step_overhead,
            most_copied_bytes=copied,
            missed_bytes=round(sum(work.missed_bytes for work in works)),
            copied_bytes=round(sum(work.copied_bytes for work in works)),
            launches=round(sum(work.model_launches + work.launches for work in works)),
            why_ahead=decoding.why_ahead,
            predicted_layers=sum(work.lead is not None for work in works),
            ahead_per_cent=decoding.ahead_per_cent,
            time=None if rates is None else step_time(works, rates),
            unhidden_ms=None if rates is None else step_time([replace(work, lead=None) for work in works], rates).link,
            model_ms=None if rates is None else weights_only_ms(weight_read, model_layers(shape), rates),
        ),
        prefill_copy_bytes=forecast_bytes.prefill_copy_bytes(shape, settings, prompt, question_tokens, bits),
        link=link,
        link_gb_s=link_speed,
        card=None if on is None else on.name,
        card_gb_s=None if on is None else on.gb_s,
        card_bytes=None if memory is None else memory.nominal_bytes,
        working_bytes=working(video),
        reserve_bytes=None if memory is None else memory.reserve_bytes,
        trained_tokens=trained_tokens(source.config),
    )
    if memory is not None:
        memory.check(memory_plan.kv_bytes, smallest, source.smaller_weights)
    return memory_plan


def _fewer_tokens(
    shape: KVShape,
    tiers: TierConfig,
    prompt: int,
    needed: int,
    available: int,
    text: int,
    allowed: int,
    kind: str,
    rest: list[str],
) -> str:
    """The smallest changes with which the host tier holds the cache: fewer tokens, fewer bits, or a larger cap. rest:
    what else would do."""

    def fits(prompt: int) -> bool:
        return sizes.host_bytes(shape, tiers, prompt, host_plan.prompt_bits(shape, tiers, prompt)) <= allowed

    tokens = largest(fits, prompt) - text
    changes = [f"at most {tokens:,} {kind}"] if tokens > 0 else []
    changes += host_plan.fewer_bits(shape, tiers, prompt, allowed)
    if needed <= available:
        changes.append(f"host_kv_gb={as_gib(needed)}")
    changes += rest
    given = f"{', '.join(changes[:-1])} or {changes[-1]}" if len(changes) > 1 else "".join(changes)
    return f"give {given}" if changes else f"that is too little for any {kind}"


def _local(medium: Medium) -> Medium:
    """A medium whose URL is downloaded to a file, which is removed with the last reference to it."""
    if is_url(medium.source):
        medium = copy(medium)
        medium.source = download(medium.source)
    return medium
