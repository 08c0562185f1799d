"""The link between card and host by name. Rates are GB/s (1e9 bytes)."""

from __future__ import annotations

from tieredkv.errors import OptionError
from tieredkv.planning.cards import as_rate

LINKS = {"pcie3x16": 11.3, "pcie4x4": 6.6, "pcie4x8": 13.4, "pcie4x16": 25.0, "pcie5x16": 56.0}
"""Host-to-device GB/s as measured on such links: less than the rating of the bus."""


def find_link(link: str | float) -> tuple[str, float]:
    """Name and GB/s of a link: a name in `LINKS`, whatever its case and spaces, or GB/s, with or without the unit."""

    def plain(name: str) -> str:
        return "".join(letter for letter in name.lower() if letter.isalnum())

    for name, speed in LINKS.items():
        if plain(str(link)) == plain(name):
            return name, speed
    given = as_rate(link)
    if given is None:
        raise OptionError(f"link={link!r} is not known: give GB/s, or one of {', '.join(LINKS)}.")
    return f"{given:g} GB/s", given
