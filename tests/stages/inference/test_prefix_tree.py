"""The tree of token sequences, and the passes that read it: every token of every sequence, after those before it."""

from __future__ import annotations

import random

import pytest

from stages.inference.prefix_tree import LEAST_SHARED, Tokens, passes, prefix_tree


def read_by_passes(sequences: list[Tokens], budget: int) -> tuple[set[Tokens], int]:
    """Follow the passes with a list for a cache; return what ends where a sequence ends, and the tokens read."""
    cache: list[int] = []
    complete: set[Tokens] = set()
    count = 0
    for each in passes(prefix_tree(sequences), sequences, budget):
        if each.action == "forget":
            assert each.known == len(cache) - len(each.nodes[0].tokens)
            del cache[each.known :]
            continue
        assert each.known == len(cache)
        texts: list[Tokens] = []
        for top in each.nodes:
            assert top.start == each.known
            offset = len(texts)
            for node, parent in [(top, -1)] if each.action == "keep" else top.below():
                before = texts[offset + parent] if parent >= 0 else tuple(cache)
                assert len(before) == node.start
                texts.append(before + node.tokens)
                count += len(node.tokens)
                members = sequences[node.first : node.stop]
                assert members
                assert all(member[: node.end] == texts[-1] for member in members)
                complete |= {member for member in members if len(member) == node.end}
        if each.action == "keep":
            cache += each.nodes[0].tokens
        else:
            assert sum(top.size for top in each.nodes) <= budget
    assert not cache
    return complete, count


@pytest.mark.parametrize("budget", [1, 8, 50, 500])
@pytest.mark.parametrize("seed", range(20))
def test_every_sequence_is_read_to_its_end(seed: int, budget: int) -> None:
    rng = random.Random(seed)
    starts = [tuple(rng.choices(range(3), k=rng.randint(0, 60))) for _ in range(4)]
    texts = {rng.choice(starts) + tuple(rng.choices(range(3), k=rng.randint(1, 30))) for _ in range(40)}
    sequences = sorted(texts)
    assert read_by_passes(sequences, budget)[0] == texts


def test_a_shared_start_is_read_once() -> None:
    start = tuple(range(100))
    sequences = [(*start, 200 + number, 300) for number in range(50)]
    assert read_by_passes(sequences, 64) == (set(sequences), 100 + 2 * 50)


def test_a_short_start_is_read_again_in_place_of_a_pass_of_its_own() -> None:
    start = tuple(range(LEAST_SHARED - 1))
    sequences = [(*start, 200 + number, *range(40)) for number in range(4)]
    assert read_by_passes(sequences, 100) == (set(sequences), 4 * (len(start) + 41))


def test_sequences_that_continue_each_other_need_no_recursion() -> None:
    sequences = [tuple(range(length)) for length in range(1, 3_000)]
    complete, count = read_by_passes(sequences, 128)
    assert complete == set(sequences)
    assert count < 2_999 * LEAST_SHARED
