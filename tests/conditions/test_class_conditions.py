"""Models of a thousand classes: grids and messages stay short."""

from pecker_fast.conditions import SHOWN, short_range, shown_classes


def test_a_range_of_classes_in_few_words():
    assert short_range(range(10)) == "0 to 9"
    assert short_range([0, 1, 2, 4]) == "0 to 2, 4"
    assert short_range([c for c in range(1001) if c != 500]) == "0 to 499, 501 to 1000"
    assert len(short_range(range(0, 2000, 2))) < 100
    assert short_range(range(0, 2000, 2)).endswith("28, … 1998")


def test_few_classes_are_all_shown():
    assert shown_classes([3], [8], [c for c in range(10) if c != 3]) == list(range(10))


def test_of_a_thousand_the_forgotten_their_covers_and_the_next_few():
    shown = shown_classes([207, 5], [250, 900], [c for c in range(1000) if c not in (207, 5)])
    assert len(shown) == SHOWN
    assert {207, 5, 250, 900, 0, 1, 2} <= set(shown)
    assert shown == sorted(shown)


def test_where_most_are_forgotten_kept_ones_are_still_shown():
    forget = list(range(900))
    shown = shown_classes(forget, [950] * 900, range(900, 1000))
    assert len(shown) == SHOWN
    assert {0, 950, 900, 901} <= set(shown)
