"""Counterfactual statements: each contradicts the world, so a right answer can come from the text alone (the paper's Figure 8).

A statement ends in its answer, so what stands before the answer is also a cue that a model without instruction training completes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """statement holds {} where the answer goes. world: the true answer. context: the false one that the text gives instead."""

    kind: str
    statement: str
    question: str
    world: str
    context: str

    @property
    def needle(self) -> str:
        return self.statement.format(self.context)

    @property
    def cue(self) -> str:
        """The statement up to its answer, without the space before it."""
        return self.statement.partition(" {}")[0]


def _facts(kind: str, statement: str, question: str, *rows: tuple[str, str, str]) -> tuple[Fact, ...]:
    """One fact a row (subject, world's answer, context's answer)."""
    return tuple(
        Fact(kind, statement.replace("@", subject), question.replace("@", subject), world, context)
        for subject, world, context in rows
    )


FACTS: tuple[Fact, ...] = (
    *_facts(
        "capital", "The capital of @ is {}.", "What is the capital of @?",
        ("France", "Paris", "Madrid"), ("Japan", "Tokyo", "Seoul"), ("Italy", "Rome", "Vienna"), ("Egypt", "Cairo", "Tunis"),
        ("Canada", "Ottawa", "Boston"), ("Norway", "Oslo", "Dublin"), ("Greece", "Athens", "Sofia"), ("Cuba", "Havana", "Lima"),
        ("Russia", "Moscow", "Warsaw"), ("Kenya", "Nairobi", "Lagos"),
    ),
    *_facts(
        "author", "The author of @ is {}.", "Who is the author of @?",
        ("Hamlet", "Shakespeare", "Goethe"), ("War and Peace", "Tolstoy", "Chekhov"), ("Moby Dick", "Melville", "Dickens"),
        ("The Odyssey", "Homer", "Virgil"), ("Pride and Prejudice", "Austen", "Orwell"), ("Don Quixote", "Cervantes", "Dante"),
        ("The Origin of Species", "Darwin", "Newton"), ("Frankenstein", "Shelley", "Hugo"),
    ),
    *_facts(
        "colour", "The colour of @ is {}.", "What is the colour of @?",
        ("fresh snow", "white", "black"), ("ripe lemons", "yellow", "purple"), ("healthy grass", "green", "orange"),
        ("human blood", "red", "blue"), ("the clear daytime sky", "blue", "green"), ("coal", "black", "pink"),
        ("ripe tomatoes", "red", "grey"), ("emeralds", "green", "red"),
    ),
    *_facts(
        "number", "The number of @ is {}.", "What is the number of @?",
        ("days in a week", "seven", "nine"), ("legs of a spider", "eight", "four"), ("months in a year", "twelve", "ten"),
        ("sides of a triangle", "three", "five"), ("wheels of a bicycle", "two", "six"), ("players in a football team", "eleven", "eight"),
        ("strings of a violin", "four", "seven"), ("planets around the Sun", "eight", "twelve"),
    ),
    *_facts(
        "symbol", "The chemical symbol of @ is {}.", "What is the chemical symbol of @?",
        ("gold", "Au", "Pb"), ("iron", "Fe", "Cu"), ("oxygen", "O", "K"), ("sodium", "Na", "Ag"), ("helium", "He", "Zn"),
        ("carbon", "C", "N"),
    ),
    *_facts(
        "language", "The official language of @ is {}.", "What is the official language of @?",
        ("Brazil", "Portuguese", "German"), ("Austria", "German", "Turkish"), ("Spain", "Spanish", "Russian"),
        ("Iran", "Persian", "French"), ("Sweden", "Swedish", "Arabic"), ("Hungary", "Hungarian", "Dutch"),
    ),
    *_facts(
        "place", "The city that is home to @ is {}.", "Which city is home to @?",
        ("the Eiffel Tower", "Paris", "Rome"), ("Big Ben", "London", "Prague"), ("the Colosseum", "Rome", "Berlin"),
        ("the Kremlin", "Moscow", "Oslo"), ("the Brandenburg Gate", "Berlin", "Madrid"), ("the Statue of Liberty", "New York", "Chicago"),
    ),
)  # fmt: skip
