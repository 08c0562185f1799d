"""Cards by name: what people write finds the card, and a bare number is a card before it is GB/s."""

from __future__ import annotations

import pytest

from tieredkv.errors import OptionError
from tieredkv.planning.cards import CARDS, find_card


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("RTX 3060", "RTX 3060"),
        ("rtx3060", "RTX 3060"),
        ("3060", "RTX 3060"),
        (3060, "RTX 3060"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060"),
        ("RTX 3060 12GB", "RTX 3060"),
        ("RTX 3060 8 GB", "RTX 3060 8GB"),
        ("4060 ti", "RTX 4060 Ti"),
        ("4060 Ti 8GB", "RTX 4060 Ti"),
        ("RTX 4060 Ti 16GB", "RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop"),
        ("NVIDIA RTX 4000 Ada Generation", "RTX 4000 Ada"),
        ("A4000", "RTX A4000"),
    ],
)
def test_a_card_is_found_as_people_and_drivers_write_it(text, name):
    assert find_card(text).name == name


@pytest.mark.parametrize("text", ["360 GB/s", "360GB/s", "360 gbs", "360", 360, 360.0])
def test_a_bandwidth_has_a_unit_or_is_no_cards_number(text):
    card = find_card(text)
    assert (card.name, card.gb_s, card.memory_gib) == ("360 GB/s", 360, None)


def test_a_cards_number_with_the_unit_is_a_bandwidth():
    assert find_card("3060 GB/s").gb_s == 3060


@pytest.mark.parametrize("text", ["RTX 9999", "RTX 3060 16GB", "", "-1", 0, True, "nan", "inf", "RTX", "Ti", "GB"])
def test_an_unknown_name_lists_the_known_ones(text):
    with pytest.raises(OptionError, match=r"is not known: give GB/s, such as '360 GB/s', or one of RTX 3050, .* A10\."):
        find_card(text)


def test_two_memory_sizes_are_two_cards_and_the_shorter_name_has_its_own():
    sizes = {card.name: card.memory_gib for card in CARDS}
    assert (sizes["RTX 3060"], sizes["RTX 3060 8GB"]) == (12, 8)
    assert (sizes["RTX 4060 Ti"], sizes["RTX 4060 Ti 16GB"]) == (8, 16)
    assert (sizes["RTX 5060 Ti"], sizes["RTX 5060 Ti 16GB"]) == (8, 16)
    assert len(sizes) == len(CARDS)


def test_every_name_finds_its_own_card():
    for card in CARDS:
        assert find_card(card.name) is card
        assert find_card(f"{card.name} {card.memory_gib}GB") is card
