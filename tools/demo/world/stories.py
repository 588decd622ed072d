"""A request for a story, and the story that honours it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from zlib import crc32

from tools.demo.world import nouns, words
from tools.demo.world.draw import FOOD, FOODS, KNOWN, PEOPLE, PLACES, THING, Pool, is_female
from tools.demo.world.grammar import article, capitalise, chance, expand, pick
from tools.demo.world.plots import PLOTS, SHARED, Plot

HELD_OUT_SHARE = 16  # one (hero, thing) pair in so many is kept for evaluation
WHEN = ["one {weather} {daytime}", "one {weather} {daytime}", "on a {weather} {daytime}"]
_PEOPLE = frozenset(PEOPLE)
_PLAIN = frozenset(noun for noun in nouns.PLAIN_THINGS + nouns.LONG if " " not in noun)  # things of any look


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
    third: Figure = Figure()
    thing: str = ""
    look: str = ""
    gift: str = ""
    place: str = ""
    theme: str = ""
    plot: str = ""
    long: bool = False

    def mentions(self) -> list[str]:
        """Words that a story which honours the request must contain."""
        wanted = [self.hero.kind, self.hero.name, self.hero.trait, self.friend.kind, self.friend.name, self.third.kind]
        wanted += [f"{self.look} {self.thing}".strip(), self.gift, self.place, self.theme]
        return [word for word in wanted if word]


@dataclass(frozen=True, eq=False)
class Story:
    """A story, what stands in the slots of its plot, and which slots its text uses."""

    plot: Plot
    text: str
    slots: dict[str, str]
    used: frozenset[str]

    def longer(self) -> Story:
        """The same story with what happened later."""
        text = f"{self.text}\n{self.slots['EPILOGUE']}"
        return replace(self, text=text, slots=self.slots | {"TEXT": text})


def _figure_slots(
    rng: Random, prefix: str, figure: Figure, pool: Pool, taken_names: set[str], taken_kinds: set[str]
) -> dict[str, str]:
    kind = figure.kind
    while not kind or (not figure.kind and kind in taken_kinds):
        kind = pool.kind(rng)
    name = figure.name or pool.name(rng, kind, taken_names)
    trait = figure.trait or (pick(rng, words.TRAITS) if chance(rng, 0.6) else "")
    size = pick(rng, ["young", "little", "small"]) if kind not in _PEOPLE and chance(rng, 0.4) else ""
    taken_names.add(name)
    taken_kinds.add(kind)
    he, him, his = ("she", "her", "her") if is_female(name, kind) else ("he", "him", "his")
    short = "" if prefix == "h" else prefix
    return {
        prefix: name,
        f"{prefix}_kind": kind,
        f"{prefix}_kind_a": article(kind),
        f"{prefix}_a": article(" ".join(word for word in (trait, size, kind) if word)),
        f"{short}he": he,
        f"{short}him": him,
        f"{short}his": his,
        f"{prefix}_trait": trait,
    }


def _thing_slots(rng: Random, slot: str, noun: str, look: str | None) -> dict[str, str]:
    if look is None:
        looks = words.FOOD_LOOKS if noun in FOODS else words.COLOURS if chance(rng, 0.7) else words.LOOKS
        look = pick(rng, looks) if (noun in _PLAIN or noun in FOODS) and chance(rng, 0.7) else ""
    full = f"{look} {noun}".strip()
    return {slot: noun, f"{slot}_full": full, f"{slot}_a": article(full), f"{slot}_look": look}


def _choose_plot(rng: Random, request: Request) -> Plot:
    def suits(plot: Plot) -> bool:
        return (
            request.plot in ("", plot.name)
            and (not request.thing or (FOOD if request.thing in FOODS else THING) in plot.things)
            and (not request.gift or (FOOD if request.gift in FOODS else THING) in plot.gifts)
        )

    return pick(rng, [plot for plot in PLOTS if suits(plot)])


def _third_slots(rng: Random, plot: Plot, request: Request) -> dict[str, str]:
    """A third figure comes along at the end if one was asked for, and now and then otherwise."""
    comes = "{x}" not in plot.text and (request.third != Figure() or chance(rng, 0.06))
    return {"THIRD": SHARED["THIRD_COMES"] if comes else ""}


def _scene_slots(rng: Random, request: Request, pool: Pool) -> dict[str, str]:
    place = request.place or pool.place(rng)
    look = pick(rng, words.PLACE_LOOKS) if chance(rng, 0.35) else ""
    full_place = f"the {look} {place}" if look else f"the {place}"
    theme = request.theme or pick(rng, list(words.MORALS))
    weather, daytime = pick(rng, words.WEATHER), pick(rng, words.DAYTIMES)
    later_weather = weather
    while later_weather == weather:
        later_weather = pick(rng, words.WEATHER)
    hobby = pick(rng, words.HOBBIES)
    hobby_2 = hobby
    while hobby_2 == hobby:
        hobby_2 = pick(rng, words.HOBBIES)
    siblings = pick(rng, words.SIBLINGS)
    return {
        "p_in": f"{PLACES.get(place, 'in')} {full_place}", "p_to": f"to {full_place}", "moral": words.MORALS[theme],
        "weather": weather, "daytime": daytime, "when": pick(rng, WHEN), "weather_day": article(f"{weather} {daytime}"),
        "later_weather": later_weather, "home": pick(rng, words.HOMES), "hobby": hobby, "hobby_2": hobby_2,
        "feel": pick(rng, words.GLAD), "age": pick(rng, words.AGES), "siblings": siblings,
        "sibling_kind": siblings.split()[1].removesuffix("s") + "s", "favourite": pick(rng, words.COLOURS),
        "dream": pick(rng, words.DREAMS), "e_a": article(pick(rng, nouns.FOODS)),
        "other_trait": pick(rng, words.TRAITS),
    }  # fmt: skip


def tell(
    rng: Random,
    request: Request,
    taken_names: set[str] | None = None,
    evaluation: bool = False,
    pool: Pool = KNOWN,
) -> Story:
    """A story that honours `request`. Names in `taken_names` are avoided, those of the story are added to it.

    Where the teller chooses hero or thing, both come from `pool`, and the pair is one of those held out if and only if
    `evaluation`.
    """
    taken_names = set() if taken_names is None else taken_names
    taken_names.update(name for name in (request.hero.name, request.friend.name) if name)
    plot = _choose_plot(rng, request)
    kinds = {figure.kind for figure in (request.hero, request.friend, request.third) if figure.kind}
    hero, thing = request.hero, request.thing
    while not (hero.kind and thing):
        kind = hero.kind or pool.kind(rng)
        drawn = request.thing or pool.thing(rng, plot.things)
        if held_out(kind, drawn) == evaluation and kind not in kinds - {hero.kind} and drawn != request.gift:
            hero, thing = replace(hero, kind=kind), drawn
    slots = dict(SHARED)
    slots |= _figure_slots(rng, "h", hero, pool, taken_names, kinds)
    slots |= _figure_slots(rng, "f", request.friend, pool, taken_names, kinds)
    slots |= _figure_slots(rng, "x", request.third, pool, taken_names, kinds)

    gift = request.gift
    while not gift or gift == thing:
        gift = pool.thing(rng, plot.gifts or (THING,))
    slots |= _thing_slots(rng, "o", thing, request.look or None)
    slots |= _thing_slots(rng, "g", gift, None)
    slots |= _scene_slots(rng, request, pool) | _third_slots(rng, plot, request)
    if request.theme:
        slots["CLOSE"] = slots["LESSON"]
    use = _use(thing)
    slots |= {"verb": nouns.LOUD.get(thing, ""), "PULL": SHARED[f"PULL_{use}"], "SIGNAL": SHARED[f"SIGNAL_{use}"]}
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
    slots["EPILOGUE"] = capitalise(" ".join(expand(SHARED["EPILOGUE"], rng, slots).split()))
    slots["TEXT"] = text
    for clause, words_of_it in plot.clauses.items():
        slots[clause] = expand(words_of_it, rng, slots)
    slots["SUM"] = capitalise(slots["sum"])
    told = Story(plot, text, slots, frozenset(used))
    return told.longer() if request.long else told


def _use(thing: str) -> str:
    """How a thing helps someone in trouble."""
    if thing in nouns.LIGHTS:
        return "light"
    if thing in nouns.LOUD:
        return "loud"
    return "long" if thing in nouns.LONG else "other"
