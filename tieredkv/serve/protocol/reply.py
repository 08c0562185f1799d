"""What replies of both protocols say about an answer: tokens used, and our own additions in one object."""

from __future__ import annotations

from typing import Any

from tieredkv.serve.asked import Answer, Shown


def cached_tokens(answer: Answer) -> int:
    """Tokens of the prompt that were not read anew: those of the films, if their session was there already."""
    return answer.generation.stats.visual_tokens if answer.reused else 0


def additions(answer: Answer, media: tuple[Shown, ...]) -> dict[str, Any]:
    """`tieredkv` of a reply.

    evidence: moments, best first; None if they were not asked for. media: what they are of, by `medium`.
    """
    generation = answer.generation
    found: dict[str, Any] = {
        "evidence": None if generation.evidence is None else [moment.as_dict() for moment in generation.evidence],
        "stats": generation.stats.as_dict(),
        "reused": answer.reused,
        "media": [{"name": shown.film.name, "kind": shown.film.kind, "sha256": shown.film.sha256} for shown in media],
    }
    if answer.tokens is not None:
        found["token_evidence"] = [{"text": token.text, "moments": list(token.moments)} for token in answer.tokens]
    if generation.times is not None:
        found["times"] = [time.as_dict() for time in generation.times]
    return found
