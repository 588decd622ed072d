"""A request for a story, the story that honours it, and the questions that the story answers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random
from zlib import crc32

from tools.demo.world import words
from tools.demo.world.grammar import article, capitalise, chance, expand, pick
from tools.demo.world.plots import COMMON_FACTS, FOOD, PLOTS, SHARED, THING, Fact, Plot

HELD_OUT_SHARE = 16  # one (hero, thing) pair in so many is kept for evaluation

THINGS = words.PLAIN_THINGS + words.LIGHTS + list(words.LOUD) + words.LONG
PEOPLE = words.PEOPLE + words.WOMEN + words.MEN
_FOODS = frozenset(words.FOODS)
_ANIMALS = frozenset(words.ANIMALS)
_PEOPLE = frozenset(PEOPLE)

SUMMARY_QUESTION = (
    "[What was the story about?|What happened in the story?|[Can|Could] you sum up the story?|Sum it up, please.]"
)
WHEN = ["one {weather} {daytime}", "one {weather} {daytime}", "on a {weather} {daytime}"]


def held_out(hero: str, thing: str) -> bool:
    """Whether stories of this hero and this thing are kept out of training."""
    return crc32(f"{hero}/{thing}".encode()) % HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class Figure:
    """Someone in a story. Empty fields are filled in when the story is told."""

    kind: str = ""
    name: str = ""
    trait: str = ""


@dataclass(frozen=True)
class Request:
    """What a story is to be about; an empty field leaves the choice to the teller."""

    hero: Figure = Figure()
    friend: Figure = Figure()
    thing: str = ""
    look: str = ""
    gift: str = ""
    place: str = ""
    theme: str = ""
    plot: str = ""

    def mentions(self) -> list[str]:
        """Words that a story which honours the request must contain."""
        wanted = [self.hero.kind, self.hero.name, self.hero.trait, self.friend.kind, self.friend.name]
        wanted += [f"{self.look} {self.thing}".strip(), self.gift, self.place, self.theme]
        return [word for word in wanted if word]


@dataclass(frozen=True)
class Question:
    key: str
    text: str
    answer: str


@dataclass
class Story:
    plot: Plot
    text: str
    slots: dict[str, str]
    facts: list[Fact] = field(default_factory=list)

    def ask(self, rng: Random, key: str | None = None) -> Question:
        """A question about the story (one of the given key, if any) with its answer."""
        fact = pick(rng, [fact for fact in self.facts if key in (None, fact.key)])
        slots, question = self.slots, fact.question
        if chance(rng, 0.25) and fact.key not in ("kind_h", "kind_f", "who_h", "who_f", "cast"):
            slots = slots | {"h": f"the {slots['h_kind']}", "f": f"the {slots['f_kind']}"}
        if chance(rng, 0.2) and "did {h} " in question and slots["he"] != slots["fhe"]:
            question = question.replace("did {h} ", "did {he} ")
        asked, answered = expand(question, rng, slots), expand(fact.answer, rng, self.slots)
        return Question(fact.key, capitalise(asked), capitalise(answered))


def coin_word(rng: Random) -> str:
    """A noun that nobody has heard before."""
    return "".join(pick(rng, words.SYLLABLES) for _ in range(1 + int(rng.random() * 2))) + pick(
        rng, words.SYLLABLE_ENDS
    )


def draw_thing(rng: Random, classes: tuple[str, ...] = (THING, FOOD)) -> str:
    if FOOD in classes and (THING not in classes or chance(rng, 0.2)):
        return pick(rng, words.FOODS)
    if chance(rng, 0.08):
        return coin_word(rng) if chance(rng, 0.3) else pick(rng, words.RARE_THINGS)
    return pick(rng, THINGS)


def draw_kind(rng: Random) -> str:
    if chance(rng, 0.02):
        return coin_word(rng)
    return pick(rng, words.ANIMALS) if chance(rng, 0.6) else pick(rng, PEOPLE)


def draw_name(rng: Random, kind: str, taken: set[str]) -> str:
    """A name that suits the kind and does not occur in `taken`."""
    while True:
        if chance(rng, 0.03):
            name = coin_word(rng).capitalize()
        elif kind in words.WOMEN or (kind not in words.MEN and chance(rng, 0.5)):
            name = pick(rng, words.FEMALE_NAMES)
        else:
            name = pick(rng, words.MALE_NAMES)
        if name not in taken:
            return name


def _figure_slots(
    rng: Random, prefix: str, figure: Figure, taken_names: set[str], taken_kinds: set[str]
) -> dict[str, str]:
    kind = figure.kind
    while not kind or (not figure.kind and kind in taken_kinds):
        kind = draw_kind(rng)
    name = figure.name or draw_name(rng, kind, taken_names)
    female = kind in words.WOMEN or (kind not in words.MEN and name in words.FEMALE_NAMES)
    if kind not in words.WOMEN + words.MEN and name not in words.FEMALE_NAMES + words.MALE_NAMES:
        female = name[-1] in "aei"
    trait = figure.trait or (pick(rng, words.TRAITS) if chance(rng, 0.6) else "")
    size = pick(rng, ["young", "little", "small"]) if kind not in _PEOPLE and chance(rng, 0.4) else ""
    taken_names.add(name)
    taken_kinds.add(kind)
    he, him, his = ("she", "her", "her") if female else ("he", "him", "his")
    short = "" if prefix == "h" else prefix
    return {
        prefix: name,
        f"{prefix}_kind": kind,
        f"{prefix}_kind_a": article(kind),
        f"{prefix}_a": article(" ".join(word for word in (trait, size, kind) if word)),
        f"{short}he": he,
        f"{short}him": him,
        f"{short}his": his,
    }


def _thing_slots(rng: Random, slot: str, noun: str, look: str | None) -> dict[str, str]:
    if look is None:
        looks = words.FOOD_LOOKS if noun in _FOODS else words.COLOURS if chance(rng, 0.5) else words.LOOKS
        look = pick(rng, looks) if noun not in words.RARE_THINGS and chance(rng, 0.55) else ""
    full = f"{look} {noun}".strip()
    return {slot: noun, f"{slot}_full": full, f"{slot}_a": article(full), f"{slot}_look": look}


def _choose_plot(rng: Random, request: Request) -> Plot:
    def suits(plot: Plot) -> bool:
        return (
            request.plot in ("", plot.name)
            and (not request.thing or (FOOD if request.thing in _FOODS else THING) in plot.things)
            and (not request.gift or (FOOD if request.gift in _FOODS else THING) in plot.gifts)
        )

    return pick(rng, [plot for plot in PLOTS if suits(plot)])


def tell(rng: Random, request: Request, taken_names: set[str] | None = None, evaluation: bool = False) -> Story:
    """A story that honours `request`. Names in `taken_names` are avoided, those of the story are added to it.

    Where the teller chooses hero or thing, the pair is one of those held out if and only if `evaluation`.
    """
    taken_names = set() if taken_names is None else taken_names
    taken_names.update(name for name in (request.hero.name, request.friend.name) if name)
    plot = _choose_plot(rng, request)
    kinds = {kind for kind in (request.hero.kind, request.friend.kind) if kind}
    hero, thing = request.hero, request.thing
    while not (hero.kind and thing):
        kind = hero.kind or draw_kind(rng)
        drawn = request.thing or draw_thing(rng, plot.things)
        if held_out(kind, drawn) == evaluation and kind != request.friend.kind and drawn != request.gift:
            hero, thing = replace(hero, kind=kind), drawn
    slots = dict(SHARED)
    slots |= _figure_slots(rng, "h", hero, taken_names, kinds)
    slots |= _figure_slots(rng, "f", request.friend, taken_names, kinds)
    slots |= _figure_slots(rng, "x", Figure(), taken_names, kinds)

    gift = request.gift
    while not gift or gift == thing:
        gift = draw_thing(rng, plot.gifts or (THING,))
    slots |= _thing_slots(rng, "o", thing, request.look or None)
    slots |= _thing_slots(rng, "g", gift, None)

    place = request.place or pick(rng, list(words.PLACES))
    look = pick(rng, words.PLACE_LOOKS) if chance(rng, 0.35) else ""
    full_place = f"the {look} {place}" if look else f"the {place}"
    theme = request.theme or pick(rng, list(words.MORALS))
    slots |= {"p_in": f"{words.PLACES[place]} {full_place}", "p_to": f"to {full_place}", "moral": words.MORALS[theme]}
    if request.theme:
        slots["CLOSE"] = slots["LESSON"]
    slots |= {"weather": pick(rng, words.WEATHER), "daytime": pick(rng, words.DAYTIMES), "when": pick(rng, WHEN)}
    slots |= {"home": pick(rng, words.HOMES), "hobby": pick(rng, words.HOBBIES), "feel": pick(rng, words.GLAD)}
    use = _use(thing)
    slots |= {"verb": words.LOUD.get(thing, ""), "PULL": SHARED[f"PULL_{use}"], "SIGNAL": SHARED[f"SIGNAL_{use}"]}
    slots["NOTICE"] = SHARED["NOTICE_loud" if use == "loud" else "NOTICE_other"]
    for name, options in plot.slots.items():
        option = pick(rng, options)
        if isinstance(option, str):
            slots |= {name: option, f"{name}_a": article(option)}
        else:
            slots |= {name: option[0], f"{name}_2": option[1]}

    used: set[str] = set()
    paragraphs = [" ".join(expand(p, rng, slots, used).split()) for p in plot.text.split("\n\n")]
    text = capitalise("\n".join(paragraphs))
    return Story(plot, text, slots, _facts(plot, slots, used))


def _use(thing: str) -> str:
    """How a thing helps someone in trouble."""
    if thing in words.LIGHTS:
        return "light"
    if thing in words.LOUD:
        return "loud"
    return "long" if thing in words.LONG else "other"


def _facts(plot: Plot, slots: dict[str, str], used: set[str]) -> list[Fact]:
    """The questions that this story answers: those of its plot, and the common ones whose slots its text holds."""
    facts = [replace(fact, question=fact.question or SUMMARY_QUESTION) for fact in plot.facts]
    own = {fact.key for fact in plot.facts}
    for fact in COMMON_FACTS:
        if fact.key in own or (fact.key in ("home", "hobby", "moral", "weather") and fact.key not in used):
            continue
        if fact.key == "colour" and slots["o_look"] not in words.COLOURS:
            fact = replace(fact, answer="The story does not say.")
        if fact.key in ("kind_h", "kind_f") and slots[f"{fact.key[-1]}_kind"] in _PEOPLE:
            fact = replace(fact, question=fact.question.replace("What kind of [animal|creature] was", "What was"))
        facts.append(fact)
    return facts
