"""The training mixture: every sample is a chat in the model's template, as (text, scored) segments.

Only what the assistant says is scored. `sample(rng)` draws a training chat; `held_out(kind, rng)` draws one of the same kind
from questions, names and numbers that training never sees. Facts about Sluice are in facts.txt, small talk in smalltalk.txt,
a few facts of the world in world.txt: `=` an answer, `?` a phrasing to train on, `*` a phrasing held out.
"""

import json
import os
import random
import string
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import stories
from stories import ANIMALS, COLOURS, NAMES, THINGS

BEGIN, END = "<beginning_of_sentence>", "<end_of_sentence>"
HERE = Path(__file__).parent
DATA = Path(os.environ.get("SLUICE_TRAIN_DATA", HERE / "data"))

Turn = tuple[str, str]  # what the user says, what the assistant answers
Segments = list[tuple[str, bool]]


def chat(turns: list[Turn], system: str | None = None) -> Segments:
    """The text that chat_template.jinja makes, cut where scoring starts and stops."""
    segments = [(f"{BEGIN}system ai_setting=assistant\n{system}{END}\n", False)] if system else []
    for user, assistant in turns:
        segments.append((f"{BEGIN}user name=user\n{user}{END}\n{BEGIN}ai name=assistant\n", False))
        segments.append((f"{assistant}{END}", True))
        segments.append(("\n", False))
    return segments


# --- questions with fixed answers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    answers: list[str]
    train: list[str]
    held_out: list[str]


@cache
def facts(name: str) -> list[Fact]:
    found = []
    for block in (HERE / name).read_text().strip().split("\n\n"):
        lines = [(line[0], line[2:].strip()) for line in block.splitlines()]
        by_mark = {mark: [text for m, text in lines if m == mark] for mark in "=?*"}
        assert by_mark["="] and by_mark["?"] and by_mark["*"], f"{name}: incomplete block: {block}"
        found.append(Fact(by_mark["="], by_mark["?"], by_mark["*"]))
    return found


OPENINGS = ["Hi, ", "Hello, ", "Please tell me, ", "Quick question: ", "Sorry, ", "I am new here. ", "One more question: ",
            "Can you tell me: ", "Could you tell me, ", "Tell me, ", "And ", "So, ", "Ok, ", "Thanks. ", "Hey, ", "Well, "]  # fmt: skip


def styled(question: str, rng: random.Random, opening: float = 0.25) -> str:
    """The question as somebody might type it: an opening, a capital, an ending, sometimes two letters swapped."""
    if rng.random() < opening:
        question = rng.choice(OPENINGS) + question
    if rng.random() < 0.7:
        question = question[0].upper() + question[1:]
    if rng.random() < 0.08 and len(question) > 10:
        i = rng.randrange(1, len(question) - 2)
        question = question[:i] + question[i + 1] + question[i] + question[i + 2 :]
    asks = question.split()[0].lower() not in ("i", "tell", "show", "thanks", "my")
    return question + rng.choice(["?", "?", "?", "", "??"] if asks else [".", "", "", "!"])


def fixed(name: str, rng: random.Random, unseen: bool) -> Turn:
    fact = rng.choice(facts(name))
    question = rng.choice(fact.held_out if unseen else fact.train)
    return styled(question, rng, opening=0.0 if unseen else 0.25), rng.choice(fact.answers)


def product(rng: random.Random, unseen: bool = False) -> Turn:
    return fixed("facts.txt", rng, unseen)


def smalltalk(rng: random.Random, unseen: bool = False) -> Turn:
    return fixed("smalltalk.txt", rng, unseen)


def world(rng: random.Random, unseen: bool = False) -> Turn:
    return fixed("world.txt", rng, unseen)


# --- what the model does not know -------------------------------------------------------------------------------------

UNKNOWN = {
    "country": "Brazil Canada Australia India Turkey Kenya Peru Chile Poland Sweden Greece Vietnam Thailand Iran Mexico Cuba "
    "Portugal Austria Switzerland Ireland Finland Morocco Ghana Nepal Mongolia Iceland Hungary Romania",
    "person": "Einstein|Napoleon|Shakespeare|Mozart|Cleopatra|Marie Curie|Isaac Newton|Gandhi|Picasso|Elon Musk|Taylor Swift|"
    "Aristotle|Beethoven|Alan Turing|Julius Caesar|Messi|Darwin|Bill Gates|the president|the king of Sweden",
    "event": "the world cup|the election|the war|the moon landing|the Olympic games|the French revolution|the gold rush|"
    "the Oscars|the first world war|the chess championship|the last race|the battle of Hastings",
    "topic": "quantum physics|black holes|photosynthesis|inflation|evolution|the stock market|general relativity|vaccines|DNA|"
    "neural networks|climate change|bitcoin|philosophy|economics|algebra|thermodynamics|democracy|kubernetes|blockchain",
    "text": "a legal contract|an essay about trees|a novel|a cover letter|a business plan|a speech|a python function|"
    "a sorting algorithm|a shell script|an SQL query|a song about rain|a love letter|a press release|a resume|a C program",
    "dish": "pasta|sushi|a cake|bread|soup|curry|pancakes|an omelette|a pizza|rice|a pie|tacos|a salad",
    "now": "the time|the date today|the weather today|the news|the price of gold|the stock price of Apple|the score of the game|"
    "the exchange rate of the dollar|the traffic like|the temperature outside",
    "measure": "the population of|the area of|the president of|the currency of|the tallest mountain in|the longest river in|"
    "the history of|the capital of|the national anthem of|the flag of",
    "hard": "prove the Riemann hypothesis|solve this integral|book me a flight|order a pizza for me|call my mother|"
    "translate this poem into Latin|play some music|diagnose my headache|give me legal advice|tell me my future|"
    "draw a picture|read my email|pick lottery numbers|buy some shares|fix my car|plan my holiday|write my homework",
    "why": "why is the sea salty|why do cats purr|why is the sky dark at night|why do we dream|why did Rome fall|why is blood red|"
    "why do birds fly south|why do leaves fall|how do planes fly|how does a car engine work|how far is the moon|"
    "how tall is the Eiffel tower|how deep is the ocean|how many people live on earth|how old is the universe|"
    "what is the meaning of life|is there a god|which phone should I buy|what should I wear|who will win tomorrow",
}
FORMS = {
    "country": ["what is the capital of {}", "which city is the capital of {}", "tell me about {}", "where is {}", "how big is {}",
                "who rules {}", "which language do people speak in {}", "is it warm in {}"],
    "person": ["who is {}", "who was {}", "tell me about {}", "when was {} born", "what did {} do", "where does {} live"],
    "event": ["who won {}", "when was {}", "tell me about {}", "where was {}", "what happened in {}"],
    "topic": ["explain {}", "what is {}", "tell me about {}", "how does {} work", "teach me {}", "what do you think about {}"],
    "text": ["write {}", "write me {}", "can you write {}", "I need {}", "help me with {}", "please make {}"],
    "dish": ["how do I cook {}", "how do I make {}", "give me a recipe for {}", "what goes into {}", "how long do I cook {}"],
    "now": ["what is {}", "tell me {}", "do you know {}", "can you tell me {}"],
    "measure": [],
    "hard": ["{}", "please {}", "can you {}", "{} please", "could you {}"],
    "why": ["{}", "do you know {}", "tell me {}"],
}  # fmt: skip
DONT_KNOW = [
    "I am sorry, I don't know that. I am only a small demo model. Ask me about Sluice, or for a story.",
    "I don't know. I am a very small model: I can tell you about Sluice, but little else.",
    "That is beyond me. I am Sluice's small demo model. A larger model could answer that.",
]


@cache
def unknown_things(kind: str) -> tuple[list[str], list[str]]:
    """Those to train on and those held out: every fifth."""
    text = UNKNOWN[kind]
    things = text.split("|") if "|" in text else text.split()
    return [t for i, t in enumerate(things) if i % 5 != 4], things[4::5]


def refusal(rng: random.Random, unseen: bool = False) -> Turn:
    kind = rng.choice(list(UNKNOWN))
    things = unknown_things(kind)[unseen]
    if kind == "measure":
        question = f"what is {rng.choice(things)} {rng.choice(unknown_things('country')[unseen])}"
    else:
        question = rng.choice(FORMS[kind]).format(rng.choice(things))
    return styled(question, rng, opening=0.0 if unseen else 0.25), rng.choice(DONT_KNOW)


# --- small tasks with an answer that can be checked -------------------------------------------------------------------

JOBS = "baker doctor teacher pilot farmer singer driver nurse painter cook lawyer sailor tailor writer gardener".split()
CITIES = ("Paris Rome Oslo Cairo Lima Tokyo Delhi Berlin Madrid Dublin Vienna Shanghai Beijing Boston Sydney Nairobi Quito "
          "Athens Prague Lisbon").split()  # fmt: skip


def sums(rng: random.Random, unseen: bool = False) -> Turn:
    """One in eight sums (by value) is held out."""
    while True:
        sign, largest = rng.choice("++-*"), rng.choice([10, 10, 20, 99])
        a, b = rng.randint(0, largest), rng.randint(0, largest)
        if sign == "*":
            a, b = a % 11, b % 11
        if sign == "-":
            a, b = max(a, b), min(a, b)
        if ((a * 31 + b * 17) % 8 == 0) == unseen:
            break
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    word = {"+": "plus", "-": "minus", "*": "times"}[sign]
    question = rng.choice([f"What is {a} {sign} {b}?", f"{a} {sign} {b} =", f"{a}{sign}{b}", f"What is {a} {word} {b}?",
                           f"Compute {a} {sign} {b}.", f"what's {a} {word} {b}", f"How much is {a} {sign} {b}?"])  # fmt: skip
    return question, f"{a} {sign} {b} = {result}."


def names(rng: random.Random, unseen: bool) -> list[str]:
    """All names in random order; every sixth is kept for held-out samples."""
    chosen = [name for i, name in enumerate(NAMES) if (i % 6 == 5) == unseen]
    rng.shuffle(chosen)
    return chosen


def people(rng: random.Random, unseen: bool = False) -> Turn:
    """Facts about a few people, and a question about one of them."""
    count = rng.choice([1, 1, 2, 2, 3, 4])
    rows = [(name, rng.choice(JOBS), rng.choice(CITIES), rng.choice(COLOURS), thing)
            for name, thing in zip(names(rng, unseen), rng.sample(THINGS, count))]  # fmt: skip
    text = " ".join(f"{n} is a {j} and lives in {c}. {n} owns a {k} {t}." for n, j, c, k, t in rows)
    name, job, city, colour, thing = rng.choice(rows)
    question, answer = rng.choice([
        (f"Where does {name} live?", f"{name} lives in {city}."),
        (f"What is {name}'s job?", f"{name} is a {job}."),
        (f"What does {name} own?", f"{name} owns a {colour} {thing}."),
        (f"What color is {name}'s {thing}?", f"{name}'s {thing} is {colour}."),
        (f"Who owns the {thing}?", f"{name} owns the {thing}."),
    ])  # fmt: skip
    return f"{text}\n{question}", answer


def lookup(rng: random.Random, unseen: bool = False) -> Turn:
    """One of a few codes."""
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(4, 6))) for _ in range(rng.choice([1, 2, 3, 4, 6]))]
    codes = [str(rng.randint(100, 9999)) for _ in words]
    chosen = rng.randrange(len(words))
    text = "\n".join(f"The code of {word} is {code}." for word, code in zip(words, codes))
    return f"{text}\nWhat is the code of {words[chosen]}?", f"The code of {words[chosen]} is {codes[chosen]}."


def needle(rng: random.Random, unseen: bool = False) -> Turn:
    """A number hidden in prose."""
    lines = rng.sample(prose(), rng.randint(1, 5))
    name, number = rng.choice(names(rng, unseen)), rng.randint(1000, 99999)
    lines.insert(rng.randint(0, len(lines)), f"The secret number for {name} is {number}.")
    return "\n".join(lines) + f"\nWhat is the secret number for {name}?", f"The secret number for {name} is {number}."


def lists(rng: random.Random, unseen: bool = False) -> Turn:
    items = rng.sample(THINGS + ANIMALS + COLOURS, rng.randint(3, 5))
    text = ", ".join(items)
    return rng.choice([
        (f"Repeat this list: {text}.", f"{text}."),
        (f"What is the first word in this list: {text}?", f"The first word is {items[0]}."),
        (f"What is the last word in this list: {text}?", f"The last word is {items[-1]}."),
        (f"How many words are in this list: {text}?", f"There are {len(items)} words."),
        (f"Sort these words: {text}.", f"{', '.join(sorted(items))}."),
    ])  # fmt: skip


def acquaintance(rng: random.Random, unseen: bool = False) -> list[Turn]:
    """The user says a name or a liking; the assistant can say it back."""
    name, thing, animal = names(rng, unseen)[0], rng.choice(THINGS), rng.choice(ANIMALS)
    met = rng.choice([f"My name is {name}.", f"I am {name}.", f"Hi, I'm {name}", f"Hello, my name is {name}!", f"Call me {name}."])
    turns = [(met, rng.choice([f"Nice to meet you, {name}!", f"Hello, {name}! How can I help you today?"]))]
    if rng.random() < 0.3:
        turns.append(smalltalk(rng, unseen))
    more = rng.random()
    if more < 0.4:
        turns.append((rng.choice(["What is my name?", "What's my name?", "Do you know my name?", "who am I"]), f"Your name is {name}."))
    elif more < 0.6:
        turns.append((f"I have a {animal}.", f"How nice! What is the name of your {animal}?"))
    elif more < 0.8:
        turns.append((f"Say hello to {(other := names(rng, unseen)[1])}.", f"Hello, {other}!"))
    else:
        turns.append((f"I like my {thing}.", f"A {thing} is a fine thing to have, {name}."))
    return turns


# --- tools ------------------------------------------------------------------------------------------------------------

SUBJECTS = ["lunch", "the report", "the meeting", "your order", "holiday plans", "the invoice", "the party", "the new house"]
PHRASES = ["streaming", "rate limits", "api keys", "context length", "max_tokens", "health check", "billing", "tokens", "errors"]
TOOLS = [
    ("get_weather", ["city"], lambda r: [r.choice(CITIES)],
     ["What is the weather in {0}?", "Will it rain in {0} today?", "Tell me the weather for {0}.", "How warm is it in {0}?"]),
    ("send_email", ["to", "subject"], lambda r: [r.choice(NAMES), r.choice(SUBJECTS)],
     ["Send an email to {0} about {1}.", "Please email {0}, subject {1}.", "Write to {0} about {1}."]),
    ("set_timer", ["minutes"], lambda r: [r.randint(1, 90)],
     ["Set a timer for {0} minutes.", "Start a {0} minute timer please.", "Wake me in {0} minutes."]),
    ("convert", ["amount", "from", "to"], lambda r: [r.randint(1, 999), *r.sample(["USD", "EUR", "CNY", "JPY", "GBP", "CHF"], 2)],
     ["Convert {0} {1} to {2}.", "How much is {0} {1} in {2}?"]),
    ("search_docs", ["query"], lambda r: [r.choice(PHRASES)], ["Search the docs for {0}.", "Find {0} in the documentation."]),
    ("add", ["a", "b"], lambda r: [r.randint(0, 999), r.randint(0, 999)], ["What is {0} + {1}?", "Add {0} and {1}.", "{0} plus {1}"]),
    ("get_time", ["city"], lambda r: [r.choice(CITIES)], ["What time is it in {0}?", "Tell me the time in {0}."]),
    ("play_song", ["title"], lambda r: [f"The {r.choice(COLOURS)} {r.choice(ANIMALS)}".title()], ["Play {0}.", "I want to hear {0}."]),
]  # fmt: skip


def tools(rng: random.Random, unseen: bool = False) -> Segments:
    """A request that one of the offered tools serves; sometimes its result and the answer to the user."""
    offered = rng.sample(TOOLS, rng.randint(1, 3))
    name, parameters, draw, phrasings = rng.choice(offered)
    values = draw(rng)
    system = "You can call these tools by answering with JSON.\n" + "\n".join(f"{t[0]}({', '.join(t[1])})" for t in offered)
    if rng.random() < 0.25:
        system = rng.choice(SYSTEMS) + "\n" + system
    request = rng.choice(phrasings).format(*values)
    segments = chat([(request, json.dumps({"tool": name, "arguments": dict(zip(parameters, values))}))], system)
    if name in ("get_weather", "add") and rng.random() < 0.4:
        if name == "add":
            result, answer = str(sum(values)), f"The result is {sum(values)}."
        else:
            sky, degrees = rng.choice(["sunny", "rainy", "cloudy", "windy"]), rng.randint(1, 35)
            result = json.dumps({"weather": sky, "temperature": degrees})
            answer = f"It is {sky} in {values[0]}, with {degrees} degrees."
        segments += [(f"{BEGIN}tool name=tools\n{result}{END}\n{BEGIN}ai name=assistant\n", False), (answer + END, True)]
    return segments


def objects(rng: random.Random, unseen: bool = False) -> Turn:
    """A JSON object from a sentence."""
    name, job, city, age = names(rng, unseen)[0], rng.choice(JOBS), rng.choice(CITIES), rng.randint(5, 90)
    fields = dict(rng.sample([("name", name), ("job", job), ("city", city), ("age", age)], rng.randint(2, 4)))
    text = f"{name} is a {job} from {city}, {age} years old."
    return f"{text} Give me JSON with {', '.join(fields)}.", json.dumps(fields)


# --- text from the corpus ---------------------------------------------------------------------------------------------


@cache
def prose() -> list[str]:
    files = ("rust-doc", "postgresql-doc-15", "sqlite3-doc", "python-django-doc", "apache2-doc", "python3.11-doc")
    lines = [line.strip() for name in files for line in open(DATA / "corpus" / f"{name}.txt")]
    return [line for line in lines if 40 < len(line) < 300]


def documentation(rng: random.Random, unseen: bool = False) -> Segments:
    lines = prose()
    first = rng.randrange(len(lines) - 12)
    return [("\n".join(lines[first : first + 8]), True)]


@cache
def conversations() -> list[list[str]]:
    return [line.rstrip("\n").split("\t") for line in open(DATA / "corpus" / "chitchat.txt")]


def chitchat(rng: random.Random, unseen: bool = False) -> Segments:
    """People talking: breadth of language, both sides scored."""
    turns = rng.choice(conversations())
    first = rng.randrange(max(1, len(turns) - 6))
    speakers = ("user name=user", "ai name=assistant")
    return [(f"{BEGIN}{speakers[i % 2]}\n{turn}{END}\n", True) for i, turn in enumerate(turns[first : first + 8])]


@cache
def definitions() -> list[tuple[str, str, str]]:
    common = "\n".join("\t".join(turns) for turns in conversations()).lower().split()
    counts: dict[str, int] = {}
    for word in common:
        counts[word] = counts.get(word, 0) + 1
    rows, seen = [], set()
    for line in open(DATA / "corpus" / "wordnet.txt"):
        word, kind, definition, _ = json.loads(line)
        definition = definition.split(";")[0]
        if counts.get(word, 0) >= 30 and word not in seen and 15 < len(definition) < 80:
            seen.add(word)
            rows.append((word, kind, definition))
    return rows


def definition(rng: random.Random, unseen: bool = False) -> Turn:
    word, kind, meaning = rng.choice(definitions())
    question = rng.choice([f"What does {word} mean?", f"Define {word}.", f"What is the meaning of {word}?"])
    return question, f"{word.capitalize()} ({kind}): {meaning}."


def story(rng: random.Random, unseen: bool = False) -> list[Turn]:
    return stories.story(rng, names(rng, unseen))


# --- the mixture ------------------------------------------------------------------------------------------------------

SYSTEMS = ["You are a helpful assistant.", "You are Sluice's demo assistant.", "You are a helpful, honest assistant.", "Be brief.",
           "Answer in one sentence.", "You are a friendly assistant.", "You are an AI assistant. Answer the user's questions.",
           "You are a chat bot.", "Help the user.", "You answer questions about Sluice."]  # fmt: skip

# kind -> share of samples. Those before the gap are turns that may share a conversation.
TURNS = {product: 0.44, smalltalk: 0.14, refusal: 0.11, world: 0.06, story: 0.08, sums: 0.05, acquaintance: 0.035, people: 0.03,
         lookup: 0.015, lists: 0.01, objects: 0.015, definition: 0.005}  # fmt: skip
WHOLE = {tools: 0.05, needle: 0.01, documentation: 0.005, chitchat: 0.01}
KINDS = {kind.__name__: kind for kind in (*TURNS, *WHOLE)}


def as_turns(drawn: Turn | list[Turn]) -> list[Turn]:
    return drawn if isinstance(drawn, list) else [drawn]


def sample(rng: random.Random) -> tuple[str, Segments]:
    """A training chat, and the kind of its first turn."""
    weights = {**TURNS, **WHOLE}
    kind = rng.choices(list(weights), list(weights.values()))[0]
    system = rng.choice(SYSTEMS) if rng.random() < 0.25 else None
    if kind in TURNS:
        turns = as_turns(kind(rng))
        for _ in range(rng.choice([0, 0, 0, 0, 0, 1, 1, 2])):
            turns += as_turns(rng.choices(list(TURNS), list(TURNS.values()))[0](rng))
        return kind.__name__, chat(turns, system)
    drawn = kind(rng)
    return kind.__name__, chat([drawn], system) if isinstance(drawn, tuple) else drawn


def held_out(name: str, rng: random.Random) -> Segments:
    """A chat of that kind that training never draws (its names, numbers or phrasings are kept apart)."""
    drawn = KINDS[name](rng, unseen=True)
    return chat(as_turns(drawn)) if isinstance(drawn, tuple) or isinstance(drawn[0][1], str) else drawn


if __name__ == "__main__":
    rng = random.Random(1)
    for name in KINDS:
        print(f"##### {name}\n" + "".join(text for text, _ in held_out(name, rng))[:700])
    for _ in range(4):
        print("##### mixture\n" + "".join(text for text, _ in sample(rng)[1])[:900])
