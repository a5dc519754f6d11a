"""Needles: where they stand, that prompts have the length asked for, that the synthetic stream is what it says."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssmlens.errors import UserError
from ssmlens.tasks import stream_of
from ssmlens.tasks.facts import FACTS
from ssmlens.tasks.needle import Grid, Haystack, NeedleConfig, NeedleStream, after, asked

TEXT = "One sentence here. Another one, a little longer, follows! And a third? " * 3


def encode(text):
    return list(text.encode())


def grid(shortest=2000, facts=FACTS[:5]):
    return Grid.of(Haystack.of("text", TEXT, encode, shortest), facts, encode)


def test_there_are_enough_facts_of_several_kinds_and_none_is_ambiguous():
    assert len(FACTS) >= 40
    assert len({f.kind for f in FACTS}) >= 5
    assert len({f.question for f in FACTS}) == len(FACTS)
    for f in FACTS:
        assert f.world.lower() != f.context.lower()
        assert f.needle == f"{f.cue} {f.context}."
        assert f.world not in f.needle.split(f.cue)[1]


@given(st.integers(600, 1500), st.sampled_from([0.0, 0.1, 0.5, 0.99, 1.0]))
def test_a_prompt_is_the_haystack_with_the_needle_at_its_depth_and_has_its_length(length, depth):
    g = grid()
    cell = g.cell(length, depth)
    for i, row in enumerate(cell.rows.tolist()):
        whole = g.haystack.ids[: cell.prefix].tolist() + row
        assert len(whole) == length
        text = bytes(whole).decode()
        fact = g.facts[i]
        assert text.count(fact.needle) == 1
        assert text.endswith(f"{fact.question}\nAnswer: {fact.cue}")
        before, behind = text[: text.index(fact.needle)].rstrip(), text[text.index(fact.needle) + len(fact.needle) :]
        assert before == "" or before[-1] in ".!?" or behind[0].isspace()  # never inside a word
    room = length - g._around
    assert 0 <= depth * room - cell.prefix + 0.5 <= max(0.05 * room, len(" little longer, follows! And")) + 1


def test_a_needle_comes_after_a_sentence_where_one_ends_near_and_between_words_where_none_does():
    text = "Short one. " + "Then come very many words without an end " * 20 + "at last. And this is another."
    hay = Haystack.of("text", text, encode, 700)
    end = len("Short one.")
    assert [hay.before(t, 20) for t in (0, 5, end, end + 20)] == [0, 0, end, end]
    for target in range(end + 21, 700):
        cut = hay.before(target, 20)
        assert 0 <= target - cut < 30
        assert text[cut] == " "
    assert bytes(hay.ids.tolist()).decode().startswith(text[:700])


def spaced(text):
    """A tokenizer that puts a space of its own before every text, and joins a colon to what follows, as some do."""
    text = text if text.startswith(" ") else f" {text}"
    return [hash(piece) for piece in re.findall(r":? ?[^ :]", text)]


def test_seams_are_those_of_the_whole_text():
    fact = FACTS[0]
    question, (a, b) = asked("Answer: The", (fact.context, fact.world), spaced)
    whole = after(".", f"Answer: The {fact.context}", spaced)
    assert question + a == whole
    assert question + b == after(".", f"Answer: The {fact.world}", spaced)
    assert a[0] != b[0]
    joins = asked("it is", ("so", "no"), lambda text: [hash(piece) for piece in re.findall("is no|.", text)])
    assert joins == ([hash(c) for c in "it "], ([hash(c) for c in "is so"], [hash("is no")]))
    with pytest.raises(UserError, match="same tokens"):
        Grid.of(Haystack.of("text", TEXT, encode, 100), FACTS[:2], lambda text: [0 for _ in text.split()])


def test_special_tokens_come_first_and_once():
    hay = Haystack.of("text", TEXT, encode, 2000, [500])
    g = Grid.of(hay, FACTS[:2], encode)
    for depth in (0.0, 0.5, 1.0):
        cell = g.cell(900, depth)
        whole = hay.ids[: cell.prefix].tolist() + cell.rows[0].tolist()
        assert whole[0] == 500
        assert whole.count(500) == 1
        assert len(whole) == 900
    assert bytes(g.cell(900, 0.0).rows[0].tolist()).decode().startswith(f" {FACTS[0].needle}")


def test_depth_zero_is_the_beginning_and_one_is_right_before_the_question():
    g = grid()
    assert g.cell(900, 0.0).prefix == 0
    last = bytes(g.cell(900, 1.0).rows[0].tolist()).decode()
    between = last[last.index(g.facts[0].needle) + len(g.facts[0].needle) : last.index("\n\nUsing only")]
    assert len(between) <= 60  # less than a sentence and what the longest needle needs more


def test_the_control_differs_by_the_needle_alone():
    g = grid()
    control = bytes(g.cell(900, 0.0, control=True).rows[0].tolist()).decode()
    assert g.facts[0].needle not in control
    assert control.endswith(g.facts[0].cue)
    assert len(control.encode()) == 900


def test_a_short_text_is_repeated_and_says_so():
    haystack = Haystack.of("text", TEXT, encode, 5000)
    assert haystack.repeated == -(-5000 // len(TEXT.rstrip()))
    assert len(haystack.ids) >= 5000
    assert (haystack.ends.diff() > 0).all()


def test_bad_requests_are_named():
    with pytest.raises(UserError, match="no sentence"):
        Haystack.of("empty", " \n ", encode, 10)
    with pytest.raises(UserError, match="too short"):
        grid().cell(200, 0.5)
    with pytest.raises(UserError, match="no room for 16 keys"):
        NeedleConfig.of({"vocab_size": 20}, "data")
    with pytest.raises(UserError, match="at least 4"):
        NeedleConfig.of({"lengths": [3]}, "data")
    with pytest.raises(UserError, match="did you mean"):
        stream_of({"task": "needl"})


@given(st.integers(4, 70), st.one_of(st.none(), st.floats(0, 1)))
def test_a_synthetic_prompt_holds_one_pair_and_asks_for_it(length, depth):
    c = NeedleConfig(lengths=(length,), keys=4, vocab_size=20)
    tokens, targets, _ = NeedleStream(c).draw(6, length, depth, (0, 9))
    assert tokens.shape == (6, length) == targets.shape
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        keys = [i for i, t in enumerate(row) if t < 4]
        values = [i for i, t in enumerate(row) if 4 <= t < 8]
        assert len(values) == 1
        assert keys == [values[0] - 1, length - 1]
        assert row[keys[0]] == row[-1]
        assert wanted == [-100] * (length - 1) + [row[values[0]]]
        if depth is not None:
            assert keys[0] == round(depth * (length - 3))


def test_the_synthetic_stream_is_seeded_varied_and_its_splits_apart():
    c = NeedleConfig(lengths=(8, 16), batch_size=4)
    a, b = NeedleStream(c), NeedleStream(c)
    assert torch.equal(a.batch(3).tokens, b.batch(3).tokens)
    assert not torch.equal(a.batch(1).tokens, a.batch(3).tokens)
    assert [a.batch(i).tokens.shape for i in range(3)] == [(8, 8), (4, 16), (8, 8)]
    drawn = [a.batch(1).tokens, next(a.validation()).tokens, a.test(4, 16, 0.5).tokens]
    assert not any(torch.equal(x, y) for i, x in enumerate(drawn) for y in drawn[:i])
    assert all(torch.equal(x.tokens, y.tokens) for x, y in zip(a.validation(), b.validation(), strict=True))
    where = (a.draw(4000, 16, None, (0, 9)).tokens[:, :-1] < c.keys).float().mean(0)[:14]
    assert (where - 1 / 14).abs().max() < 0.03  # uniform: one of 14 places each
    other = NeedleStream(c.model_copy(update={"seed": 1}))
    assert not torch.equal(a.batch(1).tokens, other.batch(1).tokens)


def test_longer_prompts_join_one_after_the_other():
    stream = NeedleStream(NeedleConfig(lengths=(8, 32, 16), batch_size=2, grow_every=10))
    longest = [stream.batch(i).tokens.shape[1] for i in range(40)]
    assert set(longest[:10]) == {8}
    assert set(longest[10:20]) == {8, 16}
    assert set(longest[20:]) == {8, 16, 32}
