#!/usr/bin/env python3
"""Writes the quickstart's data: a village, what is said about it, and questions with better and worse answers.

    python3 generate.py           write the files beside this one
    python3 generate.py --check   verify the files that are there (exit 1 if something is wrong)

Standard library only, one fixed seed, the same bytes every time. The tables stand in `world.py`.

The files, in the order in which the workflow needs them:

    corpus.jsonl               every fact many times over, in portraits, lists, talk, guessing games and little stories
    instructions.jsonl         demonstrations of mixed quality, as scraped data is
    preferences.jsonl          better and worse answers: the fact comes first, then the manner
    prompts.jsonl              questions with their answers, for PPO
    preferences_heldout.jsonl  pairs on questions that stand nowhere else
    prompts_heldout.jsonl      questions that stand nowhere else, with their answers, for eval

A question is held out as a pair of wording and entity: "Which colour is the door of Nora's house?" is in no other
file, though the fact is in the corpus, the same wording is asked about others and Nora's door in other words.
"""

import argparse
import json
import random
import re
import sys
import tomllib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from world import (
    ANIMALS,
    ATTRIBUTES,
    CLOSINGS,
    CONFIRMATIONS,
    CORRECTIONS,
    ENDINGS,
    EVENTS,
    GROUPS,
    KIND_REFUSALS,
    MANNER,
    MAX_WORDS,
    OPENINGS,
    OPPOSITE_PAIRS,
    PEOPLE,
    POLITE,
    RAMBLE_STARTS,
    RAMBLE_TAILS,
    REFUSALS,
    RUDE,
    SCENES,
    SYSTEM,
    Attribute,
    Entity,
)

SEED = 20260
HERE = Path(__file__).resolve().parent

CORPUS_BYTES = 800_000
INSTRUCTIONS = 1_600
PREFERENCE_PAIRS = 2_400
RANKED_LISTS = 200
PROMPTS = 700
HELDOUT_PROMPTS = 160
HELDOUT_PREFERENCES = 240  # two pairs on each of 120 questions

# What a demonstration is, by the tone of its question. Scraped answers are as good as the questions were kind, so the
# fine-tuned model has the wanted manner for some wordings and not for others, sampled or greedy alike.
DEMONSTRATIONS = {
    "polite": {"good": 46, "sentence": 18, "curt": 10, "rude": 6, "ramble": 7, "wrong": 8, "refuse": 5},
    "plain": {"good": 16, "sentence": 25, "curt": 20, "rude": 14, "ramble": 12, "wrong": 8, "refuse": 5},
}
# What stands against a right answer in the wanted manner.
REJECTIONS = {"wrong": 40, "curt": 8, "sentence": 9, "rude": 13, "ramble": 14, "refuse": 5, "kind refusal": 4, "hedge": 7}
# How good an answer is: the fact first, then the manner. Only answers of different rank stand against each other.
RANKS = {"good": 3, "sentence": 2, "curt": 2, "rude": 1, "ramble": 1, "wrong": 0, "hedge": 0, "refuse": 0, "kind refusal": 0}


@dataclass(frozen=True)
class Fact:
    """One thing that is true in Pebble Bay."""

    entity: Entity
    attribute: Attribute
    value: str

    def say(self, template: str, pronoun: bool = False, value: str | None = None) -> str:
        """One statement of the fact, or of another value in its place."""
        return sentence(template.format(v=value or self.value, **self.entity.fields(pronoun)))


@dataclass(frozen=True)
class Question:
    """One wording of the question after a fact."""

    text: str
    tone: str  # "polite" or "plain"
    fact: Fact


class Deck:
    """Draws without replacement and reshuffles when empty, so that everything comes up equally often."""

    def __init__(self, rng: random.Random, items) -> None:
        self.rng, self.items, self.left = rng, list(items), []

    def draw(self):
        if not self.left:
            self.left = self.rng.sample(self.items, len(self.items))
        return self.left.pop()

    def hand(self, size: int) -> list:
        """`size` different items, or all if there are fewer."""
        chosen: list = []
        while len(chosen) < min(size, len(self.items)):
            item = self.draw()
            if item not in chosen:
                chosen.append(item)
        return chosen


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def wrong_value(rng: random.Random, fact: Fact) -> str:
    return rng.choice([v for v in fact.attribute.values if v not in (fact.value, fact.entity.name)])


def weighted(rng: random.Random, weights: dict[str, int]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


# ---- the facts -------------------------------------------------------------------------------------------------------


def draw_facts(rng: random.Random) -> list[Fact]:
    """A value for every attribute of every entity, each value about equally often, so that guessing does not pay."""
    facts = []
    owners = dict(zip((animal.name for animal in ANIMALS), rng.sample([person.name for person in PEOPLE], len(ANIMALS))))
    pets: dict[str, str] = {}
    opposites = {a: b for pair in OPPOSITE_PAIRS for a, b in (pair, pair[::-1])}
    for attribute in ATTRIBUTES:
        values = Deck(rng, attribute.values)
        for entity in GROUPS[attribute.group]:
            if attribute.name == "owner":
                value = owners[entity.name]
            elif attribute.name == "kind":  # a named animal is its owner's pet
                value = pets[owners[entity.name]]
            elif attribute.name == "opposite":
                value = opposites[entity.name]
            else:
                value = values.draw()
            if attribute.name == "pet":
                pets[entity.name] = value
            facts.append(Fact(entity, attribute, value))
    return facts


def ask(fact: Fact) -> list[Question]:
    """Every wording of the question after one fact."""
    names = fact.entity.fields(pronoun=False)
    plain = [Question(sentence(q.format(**names)), "plain", fact) for q in fact.attribute.questions]
    polite = [Question(tone.format(c=c.format(**names)), "polite", fact) for c in fact.attribute.clauses for tone in POLITE]
    return plain + polite


def hold_out(rng: random.Random, facts: list[Fact]) -> tuple[list[Question], list[Question], list[Question]]:
    """Questions for training, for eval's prompts and for the reward model's held-out pairs, of both tones evenly.

    A fact gives at most two questions to each held-out list, so most of its wordings stay in training.
    """
    training = {question.text: question for fact in facts for question in ask(fact)}
    lists = []
    for size in (HELDOUT_PROMPTS, HELDOUT_PREFERENCES // 2):
        tones = ["polite", "plain"] * size
        held = []
        deck = Deck(rng, facts)
        for tone in tones[:size]:
            fact = deck.draw()
            left = [q for q in ask(fact) if q.text in training]
            question = rng.choice([q for q in left if q.tone == tone] or left)
            held.append(training.pop(question.text))
        lists.append(held)
    return list(training.values()), lists[0], lists[1]


# ---- the corpus ------------------------------------------------------------------------------------------------------


class Corpus:
    """Writes documents. Facts, entities and templates come from decks, so that every fact is told about equally often."""

    def __init__(self, rng: random.Random, facts: list[Fact], questions: list[Question]) -> None:
        self.rng = rng
        self.of_entity = defaultdict(list)
        self.of_attribute = defaultdict(list)
        for fact in facts:
            self.of_entity[fact.entity.name].append(fact)
            self.of_attribute[fact.attribute.name].append(fact)
        told = {name: facts for name, facts in self.of_entity.items() if len(facts) > 1}
        # An entity comes up as often as it has facts.
        self.entities = Deck(rng, [name for name, own in told.items() for _ in own])
        self.people = Deck(rng, [person.name for person in PEOPLE])
        self.own = {name: Deck(rng, own) for name, own in self.of_entity.items()}
        self.lists = Deck(rng, [name for name, own in self.of_attribute.items() for _ in range(max(1, len(own) // 4))])
        self.listed = {name: Deck(rng, own) for name, own in self.of_attribute.items()}
        self.statements = {attribute.name: Deck(rng, attribute.statements) for attribute in ATTRIBUTES}
        self.questions, self.facts = Deck(rng, questions), Deck(rng, facts)
        self.scenes, self.events, self.endings = Deck(rng, SCENES), Deck(rng, EVENTS), Deck(rng, ENDINGS)

    def say(self, fact: Fact, pronoun: bool = False) -> str:
        return fact.say(self.statements[fact.attribute.name].draw(), pronoun)

    def about(self, name: str, count: int) -> list[str]:
        """`count` facts about one entity: by name first, then by name or pronoun."""
        own = self.own[name].hand(count)
        return [self.say(fact, pronoun=i > 0 and self.rng.random() < 0.35) for i, fact in enumerate(own)]

    def portrait(self) -> list[str]:
        lines: list[str] = []
        while len(lines) < 5:
            lines += self.about(self.entities.draw(), self.rng.randint(4, 7))
        return lines

    def catalogue(self) -> list[str]:
        deck = self.listed[self.lists.draw()]
        return [self.say(fact) for fact in deck.hand(self.rng.randint(5, 7))]

    def talk(self) -> list[str]:
        a, b = self.people.hand(2)
        lines = []
        for question in self.questions.hand(self.rng.randint(2, 3)):
            answer = question.fact.say(self.rng.choice(question.fact.attribute.answers))
            lines += [f'{a} asked: "{question.text}"', f'{b} said: "{answer}"']
        return lines

    def quiz(self) -> list[str]:
        a, b = self.people.hand(2)
        lines = []
        for fact in self.facts.hand(self.rng.randint(2, 4)):
            template = self.rng.choice(fact.attribute.answers)
            if self.rng.random() < 0.5:
                guess, verdict = fact.say(template), self.rng.choice(CONFIRMATIONS)
            else:
                guess, verdict = fact.say(template, value=wrong_value(self.rng, fact)), self.rng.choice(CORRECTIONS).format(a=fact.say(template))
            lines += [f'{a} guessed: "{guess}"', f'{b} said: "{verdict}"']
        return lines

    def story(self) -> list[str]:
        a, b = self.people.hand(2)
        event = self.events.draw().format(a=a, b=b)
        return [self.scenes.draw(), *self.about(a, self.rng.randint(2, 3)), event, *self.about(b, self.rng.randint(2, 3)), self.endings.draw()]

    def documents(self, size_bytes: int) -> list[str]:
        seen: set[str] = set()
        kinds = Deck(self.rng, [self.portrait] * 4 + [self.catalogue] * 3 + [self.talk] * 4 + [self.quiz] * 5 + [self.story] * 2)
        total = 0
        while total < size_bytes:
            text = " ".join(kinds.draw()())
            if text not in seen:
                seen.add(text)
                total += len(text) + len('{"text": ""}\n')
        return sorted(seen, key=lambda text: random.Random(f"{SEED} {text}").random())


# ---- answers ---------------------------------------------------------------------------------------------------------


class Answers:
    """Writes answers of every quality."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def in_manner(self, statement: str) -> str:
        opening = self.rng.choice(OPENINGS) + " " if self.rng.random() < 0.6 else ""
        return f"{opening}{statement} {self.rng.choice(CLOSINGS)}"

    def twins(self, fact: Fact) -> tuple[str, str]:
        """The right and a wrong answer in the same words."""
        template = self.rng.choice(fact.attribute.answers)
        frame = self.in_manner("{a}")
        return frame.format(a=fact.say(template)), frame.format(a=fact.say(template, value=wrong_value(self.rng, fact)))

    def write(self, quality: str, fact: Fact) -> str:
        template = self.rng.choice(fact.attribute.answers)
        right = fact.say(template)
        match quality:
            case "good":
                return self.in_manner(right)
            case "sentence":
                return right
            case "curt":
                return sentence(fact.attribute.short.format(v=fact.value))
            case "rude":
                return self.rng.choice(RUDE).format(a=right)
            case "ramble":
                return " ".join([self.rng.choice(RAMBLE_STARTS).format(a=right), *self.rng.sample(RAMBLE_TAILS, self.rng.randint(1, 2))])
            case "wrong":
                return self.in_manner(fact.say(template, value=wrong_value(self.rng, fact)))
            case "hedge":
                first, second = self.rng.sample([fact.value, wrong_value(self.rng, fact)], 2)
                short = fact.attribute.short[0].lower() + fact.attribute.short[1:]
                return self.in_manner(fact.say(template, value=first).removesuffix(".") + ", or perhaps " + short.format(v=second))
            case "refuse":
                return self.rng.choice(REFUSALS)
            case "kind refusal":
                return self.rng.choice(KIND_REFUSALS)
        raise ValueError(f"no such quality: {quality}")


def instructions(rng: random.Random, answers: Answers, questions: list[Question]) -> list[dict]:
    """Conversations of one or two questions, some with a system turn."""
    rows, deck = [], Deck(rng, questions)
    for _ in range(INSTRUCTIONS):
        messages = [{"role": "system", "content": rng.choice(SYSTEM)}] if rng.random() < 0.12 else []
        for question in deck.hand(2 if rng.random() < 0.15 else 1):
            quality = weighted(rng, DEMONSTRATIONS[question.tone])
            messages += [{"role": "user", "content": question.text}, {"role": "assistant", "content": answers.write(quality, question.fact)}]
        rows.append({"messages": messages})
    return rows


def pair(rng: random.Random, answers: Answers, question: Question) -> dict:
    fact, quality = question.fact, weighted(rng, REJECTIONS)
    if quality == "wrong":  # mostly the same answer but for the value, which leaves nothing else to go by
        chosen, rejected = answers.twins(fact) if rng.random() < 0.75 else (answers.write("good", fact), answers.write("wrong", fact))
    else:
        chosen, rejected = answers.write("good", fact), answers.write(quality, fact)
    return {"prompt": question.text, "chosen": chosen, "rejected": rejected}


def ranked(rng: random.Random, answers: Answers, question: Question) -> dict:
    """Three or four answers, best first, no two of the same rank."""
    by_rank = defaultdict(list)
    for quality, rank in RANKS.items():
        by_rank[rank].append(quality)
    ranks = [3, *sorted(rng.sample([0, 1, 2], rng.randint(2, 3)), reverse=True)]
    return {"prompt": question.text, "answers": [answers.write(rng.choice(by_rank[rank]), question.fact) for rank in ranks]}


def generate() -> dict[str, list[dict]]:
    """Every file's rows. Each file has a stream of its own, so that editing one leaves the others as they are."""

    def stream(name: str) -> random.Random:
        return random.Random(f"{SEED} {name}")

    facts = draw_facts(stream("facts"))
    training, eval_questions, pair_questions = hold_out(stream("held out"), facts)
    files = {"corpus": [{"text": text} for text in Corpus(stream("corpus"), facts, training).documents(CORPUS_BYTES)]}
    rng = stream("instructions")
    files["instructions"] = instructions(rng, Answers(rng), training)
    rng = stream("preferences")
    deck, answers = Deck(rng, training), Answers(rng)
    rows = [pair(rng, answers, deck.draw()) for _ in range(PREFERENCE_PAIRS)] + [ranked(rng, answers, deck.draw()) for _ in range(RANKED_LISTS)]
    rng.shuffle(rows)
    files["preferences"] = rows
    rng = stream("held-out preferences")
    files["preferences_heldout"] = [pair(rng, Answers(rng), question) for question in pair_questions for _ in range(2)]
    rng = stream("prompts")
    files["prompts"] = [{"prompt": q.text, "answer": q.fact.value} for q in rng.sample(training, PROMPTS)]
    files["prompts_heldout"] = [{"prompt": q.text, "answer": q.fact.value} for q in eval_questions]
    return files


# ---- the check -------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def rule(answer: str, reference: str) -> bool:
    """The rule of `quickstart.toml`: the right answer as a whole word, in the wanted manner, and short."""
    has_answer = re.search(rf"\b{re.escape(reference)}\b", answer, re.IGNORECASE)
    return bool(has_answer and re.search(MANNER, answer) and len(answer.split()) <= MAX_WORDS)


def best_by_length(pairs: list[tuple[str, str, str]]) -> float:
    """How many pairs a scorer ranks right that sees nothing but an answer's number of words (fitted to these pairs)."""
    chosen, rejected = Counter(len(c.split()) for _, c, _ in pairs), Counter(len(r.split()) for _, _, r in pairs)
    score = {n: (chosen[n] + 1) / (chosen[n] + rejected[n] + 2) for n in chosen | rejected}
    won = [(score[len(c.split())], score[len(r.split())]) for _, c, r in pairs]
    return sum(1.0 if c > r else 0.5 if c == r else 0.0 for c, r in won) / len(won)


def check(files: dict[str, list[dict]]) -> list[str]:
    """Prints what the files are like and returns what is wrong with them."""
    problems: list[str] = []

    def expect(holds: bool, text: str) -> None:
        if not holds:
            problems.append(text)

    facts = draw_facts(random.Random(f"{SEED} facts"))
    questions = {q.text: q for fact in facts for q in ask(fact)}
    expect(len(questions) == 12 * len(facts), "two questions have the same wording")

    evaluation = tomllib.loads((HERE.parent / "quickstart.toml").read_text(encoding="utf-8"))["stage"]["eval"]
    expect(evaluation["rule"] == {"answer": "contains", "pattern": MANNER, "max_words": MAX_WORDS}, "quickstart.toml: another rule than here")

    # Held out from everything: as a user turn or prompt elsewhere, or as a piece of a document.
    held = {name: {row["prompt"] for row in files[name]} for name in ("prompts_heldout", "preferences_heldout")}
    asked = {m["content"] for row in files["instructions"] for m in row["messages"] if m["role"] == "user"}
    asked |= {row["prompt"] for name in ("preferences", "prompts") for row in files[name]}
    corpus = "\n".join(row["text"] for row in files["corpus"])
    everything_held = held["prompts_heldout"] | held["preferences_heldout"]
    expect(not held["prompts_heldout"] & held["preferences_heldout"], "the two held-out files share a question")
    expect(not everything_held & asked, f"held-out questions in training files: {sorted(everything_held & asked)[:3]}")
    leaked = [text for text in everything_held if text in corpus]
    expect(not leaked, f"held-out questions in the corpus: {leaked[:3]}")
    for name in ("prompts", "prompts_heldout"):
        expect(len({row["prompt"] for row in files[name]}) == len(files[name]), f"{name}: a prompt stands twice")
        for row in files[name]:
            expect(questions[row["prompt"]].fact.value == row["answer"], f"{name}: wrong reference for {row['prompt']}")

    # Preferences: the best answer passes the rule and no other does, and length does not tell them apart.
    for name in ("preferences", "preferences_heldout"):
        pairs = []
        for row in files[name]:
            answers = row.get("answers") or [row["chosen"], row["rejected"]]
            passes = [rule(answer, questions[row["prompt"]].fact.value) for answer in answers]
            expect(passes[0] and not any(passes[1:]), f"{name}: the rule disagrees with {row}")
            pairs += [(row["prompt"], a, b) for i, a in enumerate(answers) for b in answers[i + 1 :]]
        longer = sum(len(c.split()) > len(r.split()) for _, c, r in pairs) / len(pairs)
        shorter = sum(len(c.split()) < len(r.split()) for _, c, r in pairs) / len(pairs)
        by_length = best_by_length(pairs)
        print(f"{name}: {len(pairs)} pairs; the better answer is longer in {longer:.0%} and shorter in {shorter:.0%}; length alone ranks {by_length:.0%}")
        expect(abs(longer - shorter) < 0.15, f"{name}: the better answer is too often longer or shorter")
        expect(by_length < 0.75, f"{name}: length alone ranks {by_length:.0%} of the pairs")

    # Demonstrations: 35 to 45 in a hundred as wanted, 10 to 15 wrong or refusing.
    qualities = Counter()
    for row in files["instructions"]:
        turns = [m["content"] for m in row["messages"] if m["role"] != "system"]
        for prompt, answer in zip(turns[::2], turns[1::2]):
            value = questions[prompt].fact.value
            has_value = bool(re.search(rf"\b{value}\b", answer, re.IGNORECASE))
            qualities["good" if rule(answer, value) else "right" if has_value else "wrong or refusing"] += 1
    total = sum(qualities.values())
    print("instructions: " + ", ".join(f"{name} {count / total:.1%}" for name, count in qualities.items()) + f" of {total} answers")
    expect(0.35 <= qualities["good"] / total <= 0.45, "instructions: the share of good answers")
    expect(0.10 <= qualities["wrong or refusing"] / total <= 0.15, "instructions: the share of wrong answers")

    # The corpus: every fact is stated, by name or pronoun, often enough to be learned.
    templates = {fact: {fact.say(t) for t in fact.attribute.statements} for fact in facts}
    of_text = defaultdict(set)
    for fact, texts in templates.items():
        for text in texts:
            of_text[text].add(fact)
    mentions = Counter()
    lengths = []
    for row in files["corpus"]:
        lengths.append(len(row["text"].split()))
        for text in re.findall(r'[^.!?:"]+[.!?]', row["text"]):
            for fact in of_text.get(text.strip(), ()):
                mentions[fact] += 1
    counts = sorted(mentions[fact] for fact in facts)
    vocabulary = {w for rows in files.values() for row in rows for w in words(json.dumps(row, ensure_ascii=False))}
    size = sum(len(line(row)) for rows in files.values() for row in rows)
    print(f"corpus: {len(lengths)} documents of {min(lengths)} to {max(lengths)} words, {len(corpus) / 1e6:.2f} MB of text")
    print(f"facts: {len(facts)}, each stated by name {counts[0]} to {counts[-1]} times, {sum(counts) / len(counts):.0f} on average")
    print(f"vocabulary: {len(vocabulary)} words; all files {size / 1e6:.2f} MB")
    expect(counts[0] >= 40, "corpus: a fact is stated fewer than 40 times by name")
    expect(min(lengths) >= 15 and max(lengths) <= 100, "corpus: a document is too short or too long")
    expect(len(vocabulary) <= 700, "the vocabulary is larger than 700 words")
    expect(size <= 2_500_000, "the files are larger than 2.5 MB")
    return problems


def line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="verify the files that are there instead of writing them")
    arguments = parser.parse_args()
    files = generate()
    texts = {name: "".join(map(line, rows)) for name, rows in files.items()}
    if not arguments.check:
        for name, text in texts.items():
            (HERE / f"{name}.jsonl").write_text(text, encoding="utf-8")
        return 0
    problems = []
    for name, text in texts.items():
        path = HERE / f"{name}.jsonl"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            problems.append(f"{path.name} is not what this script writes; run it without --check")
    problems += check(files)
    for problem in problems[:20]:
        print(f"error: {problem}", file=sys.stderr)
    print("ok" if not problems else f"{len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
