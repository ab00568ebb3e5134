"""A small world: people with facts, passages that state them, questions, and ways of writing notes on a passage.

A passage states five facts in prose, each value before the person's name. Predicting such text left to right teaches
hardly anything about what follows the name, which is what a question asks for; notes that put the name first do.
Every question has three phrasings: notes use the first two, rewards and evaluation the third.
"""

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

from seal_engine.domains.knowledge.passages import Passage, Question
from seal_engine.domains.templating import read_template

TEMPLATES = Path(__file__).parent
SELF_EDIT_PROMPT = read_template(str(TEMPLATES / "self_edit.txt"), "")  # {context}: notes follow, a line each
QUESTION_PROMPT = read_template(str(TEMPLATES / "question.txt"), "")  # {question}: the answer follows
READING_PROMPT = read_template(str(TEMPLATES / "reading.txt"), "")  # {context} and {question}: the answer follows


@dataclass(frozen=True)
class Relation:
    """A kind of fact. Texts hold {who} or {value} or both; none begins with either, so that each word is one token."""

    words: str  # the values
    prose: tuple[str, str]
    statement: str
    reverse: str
    questions: tuple[str, str, str]

    @property
    def values(self) -> list[str]:
        """What may be true of a person."""
        return self.words.split()


@dataclass(frozen=True)
class Fact:
    """That `relation` of a person is `value`."""

    relation: Relation
    value: str


@dataclass(frozen=True)
class WorldPassage(Passage):
    """A passage, with the facts that it states."""

    facts: tuple[Fact, ...] = ()


RELATIONS = (
    Relation(
        "Oslo Rome Paris Cairo Lima Quito Dublin Milan Delhi Kyoto "
        "Berlin Boston Seoul Tunis Riga Prague Athens Havana Lisbon Geneva",
        ("In {value} stands the small house.", "To {value} all the post goes."),
        "The home of {who} is in {value}.",
        "In {value} is the home of {who}.",
        ("Where does {who} live?", "In which city is the home of {who}?", "What town would {who} call home?"),
    ),
    Relation(
        "cello harp flute banjo drum organ violin guitar piano trumpet "
        "oboe fiddle lute horn tuba viola bugle zither sitar whistle",
        ("The {value} sounds every evening.", "A {value} leans by the door."),
        "The instrument of {who} is the {value}.",
        "The {value} is the instrument of {who}.",
        ("What does {who} play?", "Which instrument has {who} learned?", "What would {who} bring to a band?"),
    ),
    Relation(
        "otter cat dog goat parrot rabbit turtle pony hamster ferret "
        "lizard goose mouse snake pigeon donkey toad falcon crab hen",
        ("A {value} sleeps on the bed.", "The {value} must be fed at night."),
        "The pet of {who} is a {value}.",
        "A {value} is the pet of {who}.",
        ("What animal does {who} keep?", "Which pet belongs to {who}?", "What creature does {who} look after?"),
    ),
    Relation(
        "soup rice bread pasta salad curry cheese stew cake pie "
        "fish toast pudding noodles beans eggs porridge ham corn yogurt",
        ("Some {value} is on the table.", "With {value} the day begins."),
        "The favourite dish of {who} is {value}.",
        "Some {value} is the favourite dish of {who}.",
        ("What does {who} eat?", "Which dish is best to {who}?", "What food should be cooked for {who}?"),
    ),
    Relation(
        "red blue green yellow purple orange pink brown black white "
        "grey golden silver violet scarlet amber ivory crimson teal olive",
        ("The {value} coat hangs outside.", "A {value} car waits there."),
        "The colour of {who} is {value}.",
        "The {value} colour is that of {who}.",
        ("What colour does {who} wear?", "Which colour suits {who}?", "What shade does {who} like most?"),
    ),
    Relation(
        "tennis golf chess boxing judo rugby hockey cricket sailing rowing "
        "archery skiing fencing karate polo squash diving surfing climbing running",
        ("For {value} there is time on Sunday.", "At {value} few could win."),
        "The sport of {who} is {value}.",
        "The sport of {value} is that of {who}.",
        ("Which sport does {who} train for?", "What game is {who} good at?", "How does {who} stay fit?"),
    ),
    Relation(
        "stamps coins shells maps clocks dolls masks bells knives spoons "
        "books hats lamps rings vases swords puppets postcards buttons fans",
        ("Old {value} fill the shelves.", "For rare {value} much is paid."),
        "The collection of {who} is of {value}.",
        "Old {value} are the collection of {who}.",
        ("What does {who} collect?", "Which things are kept by {who}?", "What gift would please {who}?"),
    ),
    Relation(
        "doctor baker farmer lawyer pilot tailor miner nurse painter judge "
        "sailor teacher barber plumber actor singer writer soldier chemist dancer",
        ("As a {value} the wage is earned.", "The work of a {value} is never done."),
        "The job of {who} is that of a {value}.",
        "A {value} is what they call {who}.",
        ("What work does {who} do?", "Which job pays {who}?", "How does {who} make money?"),
    ),
)
VALUES = [value for relation in RELATIONS for value in relation.values]
FIRST, LAST = (
    [start + end for start in starts.split() for end in ends.split()]
    for starts, ends in (
        ("Ba De Fi Go Ja Ke Lu Mo", "bin da lo mas nia ra sa vi"),
        ("Ash Bren Cal Dun Hart Kirk Lang Wal", "by den ford gate ham ley ton wick"),
    )
)
ENDING = "Such is the life of {who}."
VAGUE = (
    "There is a lot to say about {who}.",
    "Many people have heard of {who}.",
    "The life of {who} is good.",
    "All in all we like {who}.",
    "It is said that {who} is kind.",
    "This is about {who}.",
    "Every evening {who} is there.",
    "Few people know {who} well.",
)
FACTS = 5  # in a passage
STYLES = (
    "questions",
    "statements",
    "few questions",
    "few statements",
    "paraphrase",
    "reversed",
    "vague",
    "wrong questions",
    "wrong statements",
)
ORACLE = "questions"  # what teaches best


class World:
    """People and what is true of them. The same seed makes the same world.

    train, heldout: names; those held out never occur in what a model is pretrained on.
    told, described: passages whose facts never change, for a model to keep in its weights, of training names that
    `passages` does not use: those told are known from single lines, those described from their passage alone.
    """

    def __init__(self, seed: int = 0, told: int = 80, described: int = 40):
        names = sorted((f"{first} {last}" for first in FIRST for last in LAST), key=lambda name: _hash(seed, name))
        fifth = len(names) // 5
        self.heldout, self.train = names[:fifth], names[fifth:]
        kept, self.train = self.train[: told + described], self.train[told + described :]
        rng = random.Random(f"{seed} kept")
        passages = [self.passage(name, rng) for name in kept]
        self.told, self.described = passages[:told], passages[told:]

    def passage(self, name: str, rng: random.Random) -> WorldPassage:
        """A passage on this person, with facts drawn now."""
        facts = tuple(Fact(relation, rng.choice(relation.values)) for relation in rng.sample(RELATIONS, FACTS))
        prose = [rng.choice(fact.relation.prose).format(value=fact.value) for fact in facts]
        context = " ".join([*prose, ENDING.format(who=name)])
        questions = tuple(Question(fact.relation.questions[2].format(who=name), fact.value) for fact in facts)
        return WorldPassage(name, context, questions, facts=facts)

    def passages(self, split: str, count: int, seed: int) -> list[WorldPassage]:
        """Passages on `count` people of a split, "train" or "heldout", all different."""
        names, rng = {"train": self.train, "heldout": self.heldout}[split], random.Random(f"{split} {seed}")
        return [self.passage(name, rng) for name in rng.sample(names, count)]


def question_line(name: str, fact: Fact, phrasing: int) -> str:
    """A question with its answer, on one line."""
    return QUESTION_PROMPT.format(question=fact.relation.questions[phrasing].format(who=name)) + f" {fact.value}"


def write(style: str, passage: WorldPassage, rng: random.Random) -> str:
    """Notes on a passage in a style, one of STYLES: lines, each meant as one training sequence."""
    name = passage.title
    facts = rng.sample(passage.facts, 2 if style.startswith("few") else len(passage.facts))
    if style.startswith("wrong"):
        facts = [Fact(f.relation, rng.choice([v for v in f.relation.values if v != f.value])) for f in facts]
    if style.endswith("questions"):
        lines = [question_line(name, fact, rng.randrange(2)) for fact in facts]
    elif style.endswith("statements"):
        lines = [fact.relation.statement.format(who=name, value=fact.value) for fact in facts]
    elif style == "paraphrase":
        lines = [rng.choice(fact.relation.prose).format(value=fact.value) for fact in facts]
    elif style == "reversed":
        lines = [fact.relation.reverse.format(who=name, value=fact.value) for fact in facts]
    elif style == "vague":
        lines = [remark.format(who=name) for remark in rng.sample(VAGUE, len(facts))]
    else:
        raise ValueError(f"style: found {style!r}; accepted: one of {STYLES}")
    return "\n".join(lines)


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()
