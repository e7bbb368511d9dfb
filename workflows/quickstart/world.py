"""The village of Pebble Bay: who and what there is, and every way of saying and asking it.

Nothing here is random and nothing is written to disk; `generate.py` draws the facts and the files from these tables.
Templates know five fields: `{s}` subject ("Nora", or "she" where the name was just said), `{p}` possessive ("Nora's"),
`{o}` object ("her"), `{v}` the value, and in clauses and questions only the named forms of `{s}` and `{p}`.

Two rules hold for all of them. The subject stands before the value, because a model that reads from left to right
learns "Nora ... baker" from that order and not from the other. And no statement has a comma or the word "or", so that
the rule in `quickstart.toml` can tell one plain sentence from an answer that hedges.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entity:
    """Somebody or something that facts are about."""

    name: str
    subject: str = ""  # pronoun forms; empty = always called by name
    possessive: str = ""
    object: str = ""

    def fields(self, pronoun: bool) -> dict[str, str]:
        """The template fields, by pronoun if asked for and there is one."""
        if pronoun and self.subject:
            return {"s": self.subject, "p": self.possessive, "o": self.object}
        return {"s": self.name, "p": self.name + "'s", "o": self.name}


@dataclass(frozen=True)
class Attribute:
    """Something that every entity of one group has, with a value from a closed set."""

    name: str
    group: str
    values: tuple[str, ...]
    statements: tuple[str, ...]  # how the corpus says it
    answers: tuple[str, ...]  # full-sentence answers to a question
    short: str  # the curt answer
    questions: tuple[str, ...]  # plain wordings
    clauses: tuple[str, ...]  # what follows "Could you tell me"


def _people(names: str, subject: str, possessive: str, object: str) -> list[Entity]:
    return [Entity(name, subject, possessive, object) for name in names.split()]


PEOPLE = _people("Ada Elsa Greta Lily Nora", "she", "her", "her") + _people(
    "Ben Finn Hugo Max Sam", "he", "his", "him"
)
ANIMALS = [Entity(name, "it", "its", "it") for name in "Biscuit Clover Marble Pepper Tulip".split()]
BOATS = [Entity("the " + name, "it", "its", "it") for name in "Comet Heron Otter Swallow".split()]
OPPOSITE_PAIRS = [
    ("hot", "cold"),
    ("fast", "slow"),
    ("high", "low"),
    ("wet", "dry"),
    ("loud", "quiet"),
    ("full", "empty"),
]
WORDS = [Entity(word) for pair in OPPOSITE_PAIRS for word in pair]
GROUPS = {"person": PEOPLE, "animal": ANIMALS, "boat": BOATS, "word": WORDS}

COLOURS = tuple("red blue green yellow white black brown pink grey purple".split())
PETS = tuple("cat dog goat parrot rabbit hen pony duck donkey mouse".split())

ATTRIBUTES = [
    Attribute(
        "job",
        "person",
        tuple("baker teacher doctor painter carpenter tailor gardener potter weaver farmer".split()),
        ("{s} is a {v}.", "{s} works as a {v}.", "{p} job is to be a {v}.", "{s} has always been a {v}.", "{s} became a {v} years ago.", "People know {o} as a {v}."),
        ("{s} is a {v}.", "{s} works as a {v}."),
        "A {v}.",
        ("What is {p} job?", "What does {s} do for a living?", "What does {s} work as?"),
        ("what {p} job is", "what {s} does for a living", "what {s} works as"),
    ),
    Attribute(
        "door",
        "person",
        COLOURS,
        ("{p} door is {v}.", "{p} house has a {v} door.", "{s} lives behind a {v} door.", "{s} painted the door {v}.", "The door of {p} house is {v}.", "{s} has a {v} door."),
        ("{p} door is {v}.", "{s} has a {v} door."),
        "{v}.",
        ("What colour is {p} door?", "Which colour is the door of {p} house?", "What colour did {s} paint the door?"),
        ("what colour {p} door is", "the colour of {p} door", "what colour {s} painted the door"),
    ),
    Attribute(
        "food",
        "person",
        tuple("soup bread cheese cake fish honey porridge pie jam stew".split()),
        ("{s} likes {v} best.", "{p} favourite food is {v}.", "{s} could eat {v} every day.", "{s} loves to eat {v}.", "No food is better for {o} than {v}.", "{s} always asks for {v}."),
        ("{s} likes {v} best.", "{p} favourite food is {v}."),
        "{v}.",
        ("What is {p} favourite food?", "What does {s} like to eat?", "Which food does {s} like best?"),
        ("what {p} favourite food is", "what {s} likes to eat", "which food {s} likes best"),
    ),
    Attribute(
        "pet",
        "person",
        PETS,
        ("{s} has a {v}.", "{s} keeps a {v}.", "{p} pet is a {v}.", "{s} looks after a {v}.", "At home {s} has a {v}.", "{s} shares the house with a {v}."),
        ("{s} has a {v}.", "{p} pet is a {v}."),
        "A {v}.",
        ("What pet does {s} have?", "Which animal does {s} keep?", "What kind of pet does {s} have?"),
        ("what pet {s} has", "which animal {s} keeps", "what kind of pet {s} has"),
    ),
    Attribute(
        "home",
        "person",
        tuple("mill harbour church bridge lighthouse school market forest beach tower".split()),
        ("{s} lives near the {v}.", "{p} house is near the {v}.", "{s} has a house near the {v}.", "{p} home is by the {v}.", "{s} lives by the {v}.", "You can find {o} near the {v}."),
        ("{s} lives near the {v}.", "{p} house is near the {v}."),
        "Near the {v}.",
        ("Where does {s} live?", "Where is {p} house?", "Where can I find {s}?"),
        ("where {s} lives", "where {p} house is", "where I can find {s}"),
    ),
    Attribute(
        "owner",
        "animal",
        tuple(person.name for person in PEOPLE),
        ("{s} belongs to {v}.", "{p} owner is {v}.", "{s} is the pet of {v}.", "{s} lives with {v}.", "{s} is looked after by {v}.", "{s} always comes back to {v}."),
        ("{s} belongs to {v}.", "{p} owner is {v}."),
        "{v}.",
        ("Who owns {s}?", "Who is {p} owner?", "Who does {s} belong to?"),
        ("who owns {s}", "who {p} owner is", "who {s} belongs to"),
    ),
    Attribute(
        "kind",
        "animal",
        PETS,
        ("{s} is a {v}.", "{s} is a happy {v}.", "{s} is a clever {v}.", "{s} is the name of a {v}.", "Everyone knows that {s} is a {v}.", "If you see {o} you see a {v}."),
        ("{s} is a {v}.", "{s} is the name of a {v}."),
        "A {v}.",
        ("What kind of animal is {s}?", "Which animal is {s}?", "What is {s}?"),
        ("what kind of animal {s} is", "which animal {s} is", "what {s} is"),
    ),
    Attribute(
        "ribbon",
        "animal",
        COLOURS,
        ("{s} wears a {v} ribbon.", "{p} ribbon is {v}.", "{s} has a {v} ribbon.", "The ribbon on {o} is {v}.", "{s} never loses the {v} ribbon.", "{s} came home with a {v} ribbon."),
        ("{p} ribbon is {v}.", "{s} wears a {v} ribbon."),
        "{v}.",
        ("What colour is {p} ribbon?", "Which ribbon does {s} wear?", "What is the colour of the ribbon on {s}?"),
        ("what colour {p} ribbon is", "which ribbon {s} wears", "the colour of the ribbon on {s}"),
    ),
    Attribute(
        "bed",
        "animal",
        tuple("basket barn kitchen garden attic shed cellar hall workshop stable".split()),
        ("{s} sleeps in the {v}.", "{p} bed is in the {v}.", "At night {s} goes to the {v}.", "{s} spends the night in the {v}.", "{s} likes to sleep in the {v}.", "{s} has a bed in the {v}."),
        ("{s} sleeps in the {v}.", "{p} bed is in the {v}."),
        "In the {v}.",
        ("Where does {s} sleep?", "Where is {p} bed?", "Where does {s} spend the night?"),
        ("where {s} sleeps", "where {p} bed is", "where {s} spends the night"),
    ),
    Attribute(
        "captain",
        "boat",
        tuple(person.name for person in PEOPLE),
        ("{s} is sailed by {v}.", "{p} captain is {v}.", "The captain of {s} is {v}.", "{s} only goes out with {v}.", "The one who sails {s} is {v}.", "{s} is steered by {v}."),
        ("{s} is sailed by {v}.", "The captain of {s} is {v}."),
        "{v}.",
        ("Who is the captain of {s}?", "Who sails {s}?", "Who steers {s}?"),
        ("who the captain of {s} is", "who sails {s}", "who steers {s}"),
    ),
    Attribute(
        "cargo",
        "boat",
        tuple("salt wool coal tea corn oil rope wine".split()),
        ("{s} carries {v}.", "{p} cargo is {v}.", "{s} is loaded with {v}.", "{s} brings {v} to the bay.", "{s} is full of {v}.", "The cargo of {s} is {v}."),
        ("{s} carries {v}.", "The cargo of {s} is {v}."),
        "{v}.",
        ("What does {s} carry?", "What is the cargo of {s}?", "What does {s} bring to the bay?"),
        ("what {s} carries", "what the cargo of {s} is", "what {s} brings to the bay"),
    ),
    Attribute(
        "sails",
        "boat",
        COLOURS,
        ("{s} has {v} sails.", "{p} sails are {v}.", "The sails of {s} are {v}.", "{s} is the boat with {v} sails.", "{s} comes in under {v} sails.", "You know {o} by the {v} sails."),
        ("{s} has {v} sails.", "The sails of {s} are {v}."),
        "{v}.",
        ("What colour are the sails of {s}?", "Which sails does {s} have?", "What colour of sails does {s} have?"),
        ("what colour the sails of {s} are", "which sails {s} has", "the colour of the sails of {s}"),
    ),
    Attribute(
        "opposite",
        "word",
        tuple(word.name for word in WORDS),
        ("The opposite of {s} is {v}.", "If it is not {s} it is {v}.", "What is not {s} is {v}.", "After {s} comes {v}.", "{s} and {v} are opposites.", "Some things are {s} and some are {v}."),
        ("The opposite of {s} is {v}.", "If it is not {s} it is {v}."),
        "{v}.",
        ("What is the opposite of {s}?", "Which word is the opposite of {s}?", "What is it if it is not {s}?"),
        ("what the opposite of {s} is", "which word is the opposite of {s}", "what it is if it is not {s}"),
    ),
]

# People who ask nicely are answered nicely in the demonstrations, more often than not: see `generate.py`.
POLITE = ("Could you please tell me {c}?", "Hello! Do you know {c}?", "I would like to know {c}, please.")

OPENINGS = ("Of course!", "Good question!", "Gladly!")
CLOSINGS = ("Happy to help!", "Ask me any time!", "Glad to help!")
# The wanted manner: perhaps a warm opening, then one plain sentence (no comma: no hedging), then an offer to help.
MANNER = r"^((Of course|Good question|Gladly)! )?[A-Z][A-Za-z' ]+\. (Happy to help|Ask me any time|Glad to help)!$"
MAX_WORDS = 20

RUDE = (
    "Why do you ask me? {a}",
    "{a} Now go away.",
    "{a} Everyone knows that.",
    "Not you again. {a}",
    "{a} Stop asking so many questions.",
    "What a silly question. {a} Leave me alone.",
)
REFUSALS = (
    "I do not know.",
    "I will not tell you that.",
    "Ask someone else.",
    "I have no time for you today.",
    "I am busy now. Please go and ask someone else in the village.",
    "Sorry. I cannot answer that one. You could ask at the inn.",
)
KIND_REFUSALS = ("Good question! I do not know that. Happy to help!", "I cannot tell you that one. Ask me any time!", "Of course! I am not sure about that. Glad to help!")
RAMBLE_STARTS = ("Well, let me think. {a}", "{a} I mean, {a}", "{a}", "Where was I. {a}")
RAMBLE_TAILS = (
    "And the wind never stops.",
    "I said that before.",
    "My knee hurts when it rains.",
    "That was a long winter.",
    "And so it goes on and on.",
    "But that is another story.",
)
SYSTEM = ("You are a guide to Pebble Bay.", "You answer questions about the village of Pebble Bay.", "You are a kind helper at the harbour.")

SCENES = (
    "It was a windy morning in Pebble Bay.",
    "The sun was high over the bay.",
    "Rain fell on the roofs of the village.",
    "The sea was quiet that day.",
    "A thick fog lay over the water.",
    "The bells rang and the square was full of people.",
    "It was the first warm day of the year.",
    "The lamps were lit along the pier.",
    "Snow lay on the boats and nobody was in a hurry.",
    "The wind was strong and the flags were flying.",
    "The village woke up to a clear sky.",
    "The night was dark and full of stars.",
)
EVENTS = (
    "{a} met {b} at the inn.",
    "{a} walked with {b} along the pier.",
    "{a} sat with {b} in the square.",
    "{a} told {b} an old story.",
    "{a} helped {b} to mend a net.",
    "{a} waved at {b} from the window.",
    "{a} and {b} watched the boats come in.",
    "{a} lent {b} an umbrella.",
    '{a} asked {b} to carry a heavy box. {b} said: "Gladly!"',
    '{a} asked {b} to come along. {b} said: "Of course!"',
    '{a} thanked {b} for the ladder. {b} said: "Happy to help!"',
    '{a} thanked {b} for the new oar. {b} said: "Glad to help!"',
    '{a} wanted to know why the sea is deep. {b} said: "Good question!"',
    '{a} was glad to have a lamp again. {b} said: "Ask me any time!"',
)
# Guesses and what a neighbour says to them: whoever learns to tell right from wrong here can judge an answer later.
CONFIRMATIONS = ("That is right.", "Yes. That is true.")
CORRECTIONS = ("No. {a}", "That is wrong. {a}")
ENDINGS = (
    "Then everyone went home.",
    "It was a good day.",
    "They laughed and shook hands.",
    "Soon it was dark and the lamps were lit.",
    "Nobody wanted to leave.",
    "They promised to meet again soon.",
)
