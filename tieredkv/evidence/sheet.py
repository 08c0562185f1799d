"""The contact sheet: question, answer, moments and heat as one picture."""

from __future__ import annotations

from functools import cache

from PIL import Image, ImageDraw, ImageFont

from tieredkv.evidence.strip import columns, percent, span, spread, ticks
from tieredkv.evidence.view import LONG_ANSWER, View, scaled
from tieredkv.memory.units import largest

WIDTH, MARGIN, GAP = 1600, 64, 20
INK, SOFT, GROUND, WELL = (28, 29, 33), (109, 112, 120), (255, 255, 255), (240, 241, 243)
WARM, LABEL = (217, 72, 15), (194, 65, 12)
MARK, STRIP = 20, 72
"""Radius of a moment's number above the strip, and the strip's height."""
WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSans-Regular.ttf",
    "DejaVuSans.ttf",
    "PingFang.ttc",
    "msyh.ttc",
    "Arial Unicode.ttf",
)
"""Tried in this order for text that Pillow's own font, which has only Latin letters, cannot write."""
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@cache
def _font(size: int, wide: bool = False) -> Font:
    for name in WIDE_FONTS if wide else ():
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def draw(view: View) -> Image.Image:
    """The picture, RGB, 1,600 pixels wide."""
    evidence, inner = view.evidence, WIDTH - 2 * MARGIN
    count = len(evidence)
    across, cell, high = _grid(view)
    rows = -(-count // across)
    question = _lines(view.question, 32, inner, 3)
    size, leading = (32, 44) if len(view.answer) > LONG_ANSWER else (46, 60)
    answer = _lines(view.answer or "(no answer)", size, inner, 8)
    text_height = 44 * len(question) + leading * len(answer) + 48
    strip_top = MARGIN + text_height + 2 * MARK + 28
    grid_top = strip_top + STRIP + 84
    grid_height = rows * (high + GAP) if count else 60
    bottom = _lines(view.note(), 22, inner, 2)
    picture = Image.new("RGB", (WIDTH, grid_top + grid_height + 16 + 32 * len(bottom) + MARGIN), GROUND)
    pen = ImageDraw.Draw(picture)
    y = MARGIN
    for line in question:
        pen.text((MARGIN, y), line, SOFT, _font_for(line, 32))
        y += 44
    y += 8
    for line in answer:
        pen.text((MARGIN, y), line, INK, _font_for(line, size))
        y += leading
    _draw_strip(picture, pen, view, strip_top)
    for place in range(count):
        left = MARGIN + place % across * (cell + GAP)
        _draw_moment(picture, pen, view, place, (left, grid_top + place // across * (high + GAP), cell, high))
    if not count:
        pen.text((MARGIN, grid_top), "No moment stands out.", SOFT, _font(28))
    for number, line in enumerate(bottom):
        pen.text((MARGIN, grid_top + grid_height + 16 + 32 * number), line, SOFT, _font_for(line, 22))
    return picture


def _grid(view: View) -> tuple[int, int, int]:
    """Number of columns, and width and height of a cell; the fewer moments, the larger."""
    width, height = (16, 9) if not view.frames else view.frames[0].size
    count, upright = len(view.evidence), height > 1.2 * width
    across = (4 if upright else 3) if count <= 4 else 6 if upright else 4
    cell = (WIDTH - 2 * MARGIN - (across - 1) * GAP) // across
    return across, cell, round(cell * min(max(height / width, 0.4), 1.8))


def _draw_strip(picture: Image.Image, pen: ImageDraw.ImageDraw, view: View, top: int) -> None:
    evidence, inner = view.evidence, WIDTH - 2 * MARGIN
    length = max(evidence.end - evidence.start, 1e-9)

    def x(time: float) -> float:
        return MARGIN + inner * (time - evidence.start) / length

    heat = columns(evidence, inner, least=5)
    row = Image.new("RGB", (inner, 1))
    row.putdata([tuple(round(a + (b - a) * share) for a, b in zip(WELL, WARM, strict=True)) for share in heat])
    picture.paste(row.resize((inner, STRIP), Image.Resampling.NEAREST), (MARGIN, top))
    small, number_font = _font(22), _font(22)
    for time, text in ticks(evidence.start, evidence.end):
        place, half = x(time), small.getlength(text) / 2
        pen.line([(place, top + STRIP), (place, top + STRIP + 9)], SOFT, 2)
        centre = min(max(place, MARGIN + half), WIDTH - MARGIN - half)
        pen.text((centre, top + STRIP + 16), text, SOFT, small, anchor="ma")
    peaks = [x(moment.peak) for moment in evidence]
    labels = spread(peaks, 2 * MARK + 8, MARGIN, WIDTH - MARGIN)
    centre, below = top - 28 - MARK, top - 28
    leads = Image.new("L", (4 * WIDTH, 4 * 28))  # drawn large and reduced, for smooth slopes
    for peak, label in zip(peaks, labels, strict=True):
        ends = [(4 * label, 0), (4 * label, 4 * 8), (4 * peak, 4 * 25)]
        ImageDraw.Draw(leads).line(ends, 255, 8, joint="curve")
    mask = leads.resize((WIDTH, 28), Image.Resampling.LANCZOS)
    picture.paste(Image.new("RGB", mask.size, SOFT), (0, below), mask)
    for number, label in enumerate(labels, start=1):
        _disc(picture, label, centre, MARK)
        pen.text((label, centre), str(number), GROUND, number_font, anchor="mm")


def _draw_moment(
    picture: Image.Image, pen: ImageDraw.ImageDraw, view: View, place: int, box: tuple[int, int, int, int]
) -> None:
    left, top, cell, high = box
    moment = view.evidence[place]
    tile = Image.new("RGB", (cell, high), WELL)
    if view.frames is None:
        ImageDraw.Draw(tile).text((cell / 2, high / 2), "no frame", SOFT, _font(24), anchor="mm")
    else:
        frame = scaled(view.frames[place].convert("RGB"), cell, high)
        tile.paste(frame, ((cell - frame.width) // 2, (high - frame.height) // 2))
    picture.paste(tile, (left, top), _rounded(cell, high, 14))
    edge = 12
    _pill(picture, str(place + 1), left + edge, top + edge, INK)
    _pill(picture, percent(moment.weight), left + cell - edge, top + edge, LABEL, right=True)
    _pill(picture, span(moment, " - "), left + edge, top + high - edge - PILL, INK)


PILL = 36


def _pill(picture: Image.Image, text: str, x: float, y: float, colour: tuple[int, ...], right: bool = False) -> None:
    """A label that is legible on any frame."""
    font = _font(22)
    width = max(PILL, round(font.getlength(text)) + 24)
    left = round(x - width if right else x)
    picture.paste(Image.new("RGB", (width, PILL), colour), (left, round(y)), _rounded(width, PILL, PILL // 2, 215))
    ImageDraw.Draw(picture).text((left + width / 2, y + PILL / 2), text, GROUND, font, anchor="mm")


def _disc(picture: Image.Image, x: float, y: float, radius: int) -> None:
    size = 2 * radius
    at = round(x) - radius, round(y) - radius
    picture.paste(Image.new("RGB", (size, size), INK), at, _rounded(size, size, radius))


@cache
def _rounded(width: int, height: int, radius: int, opacity: int = 255) -> Image.Image:
    """A mask with round corners; drawn large and reduced, for smooth edges."""
    mask = Image.new("L", (4 * width, 4 * height))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * width - 1, 4 * height - 1), 4 * radius, fill=opacity)
    return mask.resize((width, height), Image.Resampling.LANCZOS)


def _font_for(text: str, size: int) -> Font:
    return _font(size, wide=any(ord(c) > 0x2FF and not 0x2000 <= ord(c) < 0x2070 for c in text))


def _fitting(text: str, font: Font, width: int) -> int:
    """The most first characters of `text` in `width` pixels, at least one."""
    return max(1, largest(lambda count: font.getlength(text[:count]) <= width, len(text)))


def _lines(text: str, size: int, width: int, most: int) -> list[str]:
    """Text in at most `most` lines of at most `width` pixels; longer words are broken, and the rest is cut off."""
    font, rest = _font_for(text, size), text
    lines: list[str] = []
    while rest and len(lines) < most:
        fit = len(rest)
        if font.getlength(rest) > width:
            fit = _fitting(rest, font, width)
            space = rest.rfind(" ", 0, fit + 1)
            fit = space if space > 0 else fit
        lines.append(rest[:fit].rstrip())
        rest = rest[fit:].lstrip()
    if rest:
        last = lines[-1]
        while last and font.getlength(last + "\u2026") > width:
            last = last[:-1]
        lines[-1] = last.rstrip() + "\u2026"
    return lines
