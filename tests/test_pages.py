"""Pages are free, held or kept, never two of these, and what is found by a name is what was named."""

import random

import pytest

from infer.pages import PagePool, extend_names


def names_of(tokens, size=2) -> list[bytes]:
    names = []
    extend_names(names, tokens, size)
    return names


def test_a_name_says_all_tokens_up_to_the_end_of_its_page():
    assert names_of([1, 2, 3, 4]) == names_of([1, 2, 3, 4, 5])
    assert names_of([1, 2, 3, 4])[0] == names_of([1, 2, 9, 9])[0]
    assert names_of([7, 2, 3, 4])[1] != names_of([1, 2, 3, 4])[1]
    assert len({*names_of([1, 2] * 50)}) == 50


def test_names_may_be_added_as_tokens_come():
    names = []
    for stop in range(8):
        extend_names(names, list(range(stop)), 2)
    assert names == names_of(range(7))


def test_pages_that_are_given_back_are_found_by_their_names():
    pool, names = PagePool(4, 2), names_of([1, 2, 3, 4])
    pages = pool.take(3)
    pool.name(pages[:2], names)
    pool.give_back(pages)
    assert pool.available == 4
    assert pool.share([*names, b"unknown"]) == pages[:2]
    assert pool.available == 2


def test_a_page_that_two_hold_is_available_when_both_have_given_it_back():
    pool, names = PagePool(1, 2), names_of([1, 2])
    page = pool.take(1)
    pool.name(page, names)
    assert pool.share(names) == page
    pool.give_back(page)
    assert pool.available == 0
    pool.give_back(page)
    assert pool.available == 1


def test_free_pages_are_taken_first_and_then_the_least_recently_used_from_its_end():
    pool, old, new = PagePool(5, 2), names_of([1, 2, 3, 4]), names_of([5, 6, 7, 8])
    for names in (old, new):
        pages = pool.take(2)
        pool.name(pages, names)
        pool.give_back(pages)
    pool.give_back(pool.share(old))  # used again, so that new is the older
    pool.take(1)
    assert (pool.num_found(old), pool.num_found(new)) == (2, 2)
    pool.take(1)
    assert (pool.num_found(old), pool.num_found(new)) == (2, 1)
    pool.take(2)
    assert (pool.num_found(old), pool.num_found(new)) == (1, 0)


def test_what_two_computed_at_once_is_found_once_and_the_other_page_is_free_again():
    pool, names = PagePool(2, 2), names_of([1, 2])
    first, second = pool.take(1), pool.take(1)
    pool.name(first, names)
    pool.name(second, names)
    pool.give_back(first)
    pool.give_back(second)
    assert pool.take(1) == second
    assert pool.share(names) == first


def test_more_pages_than_there_are_cannot_be_taken_nor_given_back_twice():
    pool = PagePool(2, 2)
    with pytest.raises(AssertionError):
        pool.take(3)
    pages = pool.take(2)
    pool.give_back(pages)
    with pytest.raises(AssertionError):
        pool.give_back(pages)


def test_after_thousands_of_random_turns_every_page_is_available():
    draw = random.Random(0)
    pool, held = PagePool(20, 2), []
    for _ in range(5000):
        if held and draw.random() < 0.5:
            pool.give_back(held.pop(draw.randrange(len(held))))
        else:
            names = names_of([draw.randrange(2) for _ in range(draw.randrange(12))])
            pages = pool.share(names)
            found = len(pages)
            pages += pool.take(min(len(names) - found, pool.available))
            pool.name(pages, names[: len(pages)])
            held.append(pages)
        assert pool.available == 20 - len({page for pages in held for page in pages})
    for pages in held:
        pool.give_back(pages)
    assert pool.available == 20
