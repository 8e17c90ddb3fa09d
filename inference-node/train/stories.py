"""Simple stories that keep to what the prompt asks for: a plot with slots, and a prompt that names some of the slots."""

import random

NAMES = ("Anna Ben Clara David Elena Felix Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Tom Uma Victor "
         "Wendy Zoe Ling Wei Mei Hao Lily Max Emma Oscar Ruby Finn Lucy Hugo").split()  # fmt: skip
BOYS = set("Ben David Felix Henry Jack Leo Noah Paul Sam Tom Victor Wei Hao Max Oscar Finn Hugo".split())
THINGS = ("kite lamp boat bell drum book clock hat cup ring coin key map rope box chair shoe ball flute basket ladder bike "
          "scarf lantern").split()  # fmt: skip
COLOURS = "red blue green yellow white black brown pink grey orange purple golden silver".split()
ANIMALS = "fox cat dog rabbit bear mouse owl duck frog horse hen goat turtle squirrel hedgehog penguin lion elephant".split()
PLACES = ["the park", "the forest", "the river", "the beach", "the old barn", "the market", "the hill", "the garden", "the school",
          "the lake", "the mountain", "the village"]  # fmt: skip
WEATHER = "sunny rainy windy snowy cold warm quiet".split()


def a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


class Slots:
    def __init__(self, rng: random.Random, names: list[str]):
        self.hero, self.friend = names[0], names[1]
        self.animal = rng.choice(ANIMALS) if rng.random() < 0.55 else None
        self.thing, self.colour, self.place = rng.choice(THINGS), rng.choice(COLOURS), rng.choice(PLACES)
        self.weather, self.small = rng.choice(WEATHER), rng.choice(["kitten", "puppy", "bird", "lamb", "beetle", "fish"])
        boy = self.hero in BOYS
        self.he, self.his, self.him = ("he", "his", "him") if boy else ("she", "her", "her")
        self.kind = self.animal or ("boy" if boy else "girl")

    def fill(self, text: str) -> str:
        words = {
            "H": self.hero, "F": self.friend, "T": self.thing, "C": self.colour, "CT": f"{self.colour} {self.thing}",
            "aCT": f"{a(self.colour)} {self.thing}", "P": self.place, "W": self.weather, "K": self.kind, "aK": a(self.kind),
            "S": self.small, "he": self.he, "his": self.his, "him": self.him, "He": self.he.capitalize(),
            "His": self.his.capitalize(),
        }  # fmt: skip
        return text.format(**words)


# Each sentence is one of its alternatives, split by |. H hero, F friend, CT coloured thing, P place, K kind of hero.
BEGINNINGS = [
    "Once upon a time there was a little {K} named {H}.|There was once a little {K} called {H}, who lived near {P}."
    "|One {W} day, a little {K} named {H} went to {P}.",
    "{H} had {aCT}.|{He} loved {his} {CT} very much.|{H} always carried {aCT}.",
]
PLOTS = [
    ["One day the {T} was gone.|But that morning {H} could not find the {T}.", "{H} looked under the bed and behind the door."
     "|{He} looked everywhere and felt sad.", 'Then {F} came by. "What is wrong?" asked {F}.', '"I lost my {T}," said {H}.',
     "{F} helped {him} look near {P}.|Together they walked to {P}.", "There, behind a big tree, was the {CT}!"
     "|There it was, under a heap of leaves: the {CT}!", '"Thank you, {F}!" said {H} with a big smile.|{H} hugged {F} and said thank you.'],
    ["At {P}, {F} saw the {T} and wanted it too.", '"Can I play with your {T}?" asked {F}.', "At first {H} said no."
     "|{H} did not want to share.", "{F} felt sad and sat down alone.", "Then {H} saw that {F} was sad.|{H} thought about it and felt sorry.",
     '"Let us play together," said {H}.', "They took turns with the {T} until the sun went down.|They played with the {CT} all day."],
    ["{H} went to {P} with {his} friend {F}.", "Soon dark clouds came and it began to rain.|A strong wind began to blow.",
     '"I am afraid," said {F}.', '{H} held up the {T}. "Do not worry, we will stay together," {he} said.',
     "They hid under a big tree and sang a song.|They ran to a small house and waited inside.",
     "When the sun came back, they laughed and went home.|After a while the storm was over and they walked home."],
    ["{H} wanted to give {F} a gift.", "{He} had no money, so {he} thought for a long time.", "Then {H} cleaned the {T} until it was shiny."
     "|Then {H} put the {T} in a box with a ribbon.", "{H} took it to {F} at {P}.", '"Is this for me?" asked {F}. "Yes," said {H}.',
     "{F} smiled and said it was the best gift ever.|{F} was so happy that {F} danced."],
    ["At {P}, {H} heard a small cry.", "A tiny {S} was stuck in the mud.", "{H} called {F} for help.",
     "They used the {T} and a long stick to help it out.|They pulled and pulled until it was free.",
     "The {S} was wet but safe.|The {S} shook itself and looked happy.", "From that day on, the {S} followed {H} everywhere."],
    ["{H} wanted to learn to swim, but {he} was scared of the water.", '{F} said, "I will help you."', "Every day they went to {P} "
     "and then to the water.|They practiced a little every morning.", "At first {H} could only stand in the water.", "But {he} did not give up.",
     "After many days, {H} could swim alone.|One {W} morning, {H} swam all the way across.", "{F} clapped and gave {him} back the {CT}."],
    ["One night the lights went out in the whole village.", "{H} took the {CT} and went to find {F}.", '"I can not see anything," said {F}.',
     '"Take my hand," said {H}.', "They walked slowly past {P}.|Step by step they went to {P}.",
     "There they saw a thousand stars in the sky.|There they sat down and looked at the moon.", '"The dark is not so bad," said {F}.'],
    ["{H} and {F} wanted to win the race at {P}.", "{F} was fast, but {H} was slow.|{H} ran well, but {F} ran better.",
     "In the middle of the race, {F} fell down.", "{H} stopped and helped {F} up.", "They came last, but everybody cheered for them."
     "|They walked over the line hand in hand.", 'The judge gave them both a prize. "You are true friends," {F} said.'],
    ["{H} found an old map inside the {T}.", "The map showed a way to {P}.", '"Let us look for the treasure!" said {F}.',
     "They walked for a long time and dug a deep hole.|They dug and dug until their hands were dirty.",
     "In the hole was a box, and in the box was a note.|At last they found a box with a letter in it.",
     'The note said: "The treasure is your friend." {H} looked at {F} and laughed.'],
    ["{H} wanted to bake a cake for {F}.", "But there was too much salt in it.|But {he} forgot the sugar.",
     "{F} took a bite and made a funny face.", '"It is the worst cake in the world," said {H}, and {he} was sad.',
     '"Then we make a new one together," said {F}.', "They carried the new cake to {P} and ate it there, beside the {CT}."],
]  # fmt: skip
ENDINGS = "The end.|They were very happy.|And {H} never forgot that day.|After that, they were best friends.|It was a good day."


def plain_prompt(rng: random.Random) -> str:
    return rng.choice(["Tell me a story.", "Tell me a short story.", "Please tell me a story.", "I want to hear a story.", "tell me a story",
                       "Can you tell me a bedtime story?", "Can you tell me a story?", "Write a short story.", "a story please",
                       "Do you know a story?", "Another story, please."])  # fmt: skip


def detailed_prompt(rng: random.Random, slots: Slots) -> str:
    """A prompt that names one to three of the slots."""
    ask = rng.choice(["Tell me a story about", "Tell me a short story about", "Write a story about", "Write a short story about",
                      "I want a story about", "Can you tell me a story about", "tell me a story about", "Make up a story about"])  # fmt: skip
    hero = rng.choice(["{H}", "{aK}", "{aK} named {H}", "{H} and {F}", "{aK} named {H} and {his} friend {F}", "{H} the {K}"])
    extra = rng.choice(["", "", " and {aCT}", " with {aCT}", " and a {T}".replace("a {T}", a(slots.thing)), " at {P}", " who has {aCT}"])
    topic = rng.choice([hero + extra, hero + extra, hero + extra, "{aCT}", a(slots.thing), "{aCT} and {aK}"])
    return slots.fill(f"{ask} {topic}") + rng.choice([".", ".", "", "?" if ask.startswith("Can") else "."])


def story(rng: random.Random, names: list[str]) -> list[tuple[str, str]]:
    slots = Slots(rng, names)
    sentences = [*BEGINNINGS, *rng.choice(PLOTS), ENDINGS]
    text = " ".join(slots.fill(rng.choice(sentence.split("|"))) for sentence in sentences)
    turns = [(plain_prompt(rng) if rng.random() < 0.25 else detailed_prompt(rng, slots), text)]
    if rng.random() < 0.25:
        turns.append(rng.choice([
            (f"What color was the {slots.thing}?", f"The {slots.thing} was {slots.colour}."),
            (f"Who was the friend of {slots.hero}?", f"It was {slots.friend}."),
            ("Who is the story about?", f"It is about {slots.hero}, a little {slots.kind}."),
        ]))  # fmt: skip
    return turns
