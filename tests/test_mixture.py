"""Mixtures of sources: shares by name, and picks that keep to them from a few integers."""

import collections

import pytest

from train.data.mixture import Mixture, mixture_shares

TOKENS = {"general": 600, "code": 200, "multilingual/de": 150, "multilingual/fr": 50}


def test_a_name_stands_for_its_source_or_for_all_below_it_by_tokens():
    mixture = {"general": 0.5, "multilingual": 0.4, "recall": 0.1}
    shares = mixture_shares(mixture, TOKENS)
    assert shares == pytest.approx({"general": 0.5, "multilingual/de": 0.3, "multilingual/fr": 0.1, "recall": 0.1})
    assert mixture_shares({"multilingual/de": 1.0}, TOKENS) == {"multilingual/de": 1.0}


def test_a_group_and_a_source_of_it_add_up():
    shares = mixture_shares({"multilingual": 0.4, "multilingual/fr": 0.6}, TOKENS)
    assert shares == pytest.approx({"multilingual/de": 0.3, "multilingual/fr": 0.7})


def test_no_mixture_is_every_source_by_its_tokens():
    assert mixture_shares({}, TOKENS) == {name: tokens / 1000 for name, tokens in TOKENS.items()}


def test_a_star_stands_for_all_sources_by_tokens_beside_what_is_made():
    everything = mixture_shares({}, TOKENS)
    assert mixture_shares({"*": 1.0}, TOKENS) == everything
    found = mixture_shares({"*": 0.75, "recall": 0.25}, TOKENS)
    assert found == pytest.approx({name: 0.75 * share for name, share in everything.items()} | {"recall": 0.25})


def test_a_share_of_nothing_leaves_the_source_out():
    assert mixture_shares({"general": 1.0, "code": 0.0}, TOKENS) == {"general": 1.0}


def test_a_name_of_no_source_names_those_that_exist():
    with pytest.raises(ValueError, match="names 'multi', which is no source .* code, general, multilingual/de, multil"):
        mixture_shares({"multi": 1.0}, TOKENS)


@pytest.mark.parametrize("mixture", [{"code": 1.0}, {"multilingual": 1.0}, {}])
def test_a_source_without_tokens_is_refused(mixture):
    with pytest.raises(ValueError, match="has no tokens; prepare some"):
        mixture_shares(mixture, {"code": 0, "multilingual/de": 0})


def test_picks_are_the_round_robin_written_out_here():
    picks = Mixture({"a": 0.5, "b": 0.25, "c": 0.25}).take(8)
    assert picks == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("a", 2), ("b", 1), ("c", 1), ("a", 3)]


def test_every_source_keeps_to_its_share_after_any_number_of_rows():
    shares = {"general": 0.5, "math": 0.25, "code": 0.17, "multilingual": 0.08}
    counts = collections.Counter()
    mixture = Mixture(shares)
    for taken in range(1, 2000):
        ((name, row),) = mixture.take(1)
        assert row == counts[name]
        counts[name] += 1
        assert all(abs(counts[name] - share * taken) < 2 for name, share in shares.items())


def test_a_share_below_the_scale_still_comes():
    assert Mixture({"a": 1 - 1e-9, "b": 1e-9})._weights == {"a": 2**20, "b": 1}


def test_a_mixture_goes_on_from_its_state():
    whole = Mixture({"a": 0.7, "b": 0.3})
    whole.take(13)
    resumed = Mixture({"a": 0.7, "b": 0.3}, whole.state())
    assert all(isinstance(number, int) for pair in whole.state().values() for number in pair)
    assert whole.take(50) == resumed.take(50)


def test_a_source_that_is_taken_out_keeps_its_place():
    mixture = Mixture({"a": 0.5, "b": 0.5})
    mixture.take(7)
    place = mixture.state()["b"]
    mixture.set_shares({"a": 0.5, "c": 0.5})
    assert {name for name, _ in mixture.take(9)} == {"a", "c"} and mixture.state()["b"] == place
    resumed = Mixture({"b": 1.0}, mixture.state())
    assert resumed.take(1) == [("b", place[0])]


def test_equal_sources_come_in_the_order_of_their_names_however_they_are_given():
    expected = [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert Mixture({"b": 0.5, "a": 0.5}).take(4) == Mixture({"a": 0.5, "b": 0.5}).take(4) == expected
