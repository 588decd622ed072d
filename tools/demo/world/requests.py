"""Requests for stories: what is asked for, and in which words."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from tools.demo.world import words
from tools.demo.world.draw import ASKED, FOODS, NOUNS, PLACES, Pool, is_female
from tools.demo.world.grammar import article, capitalise, chance, expand, pick, plural
from tools.demo.world.plots import PLOTS, SHARED
from tools.demo.world.stories import Figure, Request, held_out


def draw_request(rng: Random, taken_names: set[str], evaluation: bool = False, pool: Pool = ASKED) -> Request:
    """A random request. With `evaluation` it names a hero and a thing that are held out as a pair."""
    plot = pick(rng, PLOTS)
    wants = {"hero"} if chance(rng, 0.75) else set()
    if chance(rng, 0.65) or evaluation:
        wants |= {"thing"}
    for part, share in (("friend", 0.25), ("place", 0.2), ("theme", 0.08), ("gift", 0.08), ("plot", 0.06)):
        if len(wants) < 3 and chance(rng, share):
            wants.add(part)
    if evaluation:
        wants = {"hero", "thing"} | ({"place"} & wants)

    request = Request(long=chance(rng, 0.04) and not evaluation)
    while True:
        kind, thing = pool.kind(rng), pool.thing(rng)
        if held_out(kind, thing) == evaluation:
            break
    if "hero" in wants:
        hero = Figure(kind=kind, trait=pick(rng, words.TRAITS) if chance(rng, 0.12) else "")
        if chance(rng, 0.2):
            hero = replace(hero, name=pool.name(rng, kind, taken_names))
        elif chance(rng, 0.1) and not evaluation:
            hero = Figure(name=pool.name(rng, "", taken_names))
        request = replace(request, hero=hero)
    if "friend" in wants:
        friend = kind
        while friend == kind:
            friend = pool.kind(rng)
        name = pool.name(rng, friend, taken_names | {request.hero.name}) if chance(rng, 0.2) else ""
        request = replace(request, friend=Figure(kind=friend, name=name))
        if "thing" not in wants and request.hero.kind and chance(rng, 0.2):
            third = friend
            while third in (friend, kind):
                third = pool.kind(rng)
            request = replace(request, third=Figure(kind=third))
    if "thing" in wants:
        look = pick(rng, words.COLOURS + words.LOOKS) if chance(rng, 0.12) and thing not in FOODS else ""
        request = replace(request, thing=thing, look=look)
    if "gift" in wants:
        gift = thing
        while gift == thing:
            gift = pool.thing(rng)
        request = replace(request, gift=gift)
    if "place" in wants:
        request = replace(request, place=pool.place(rng))
    if "theme" in wants:
        request = replace(request, theme=pick(rng, list(words.MORALS)))
    if "plot" in wants and not (request.thing or request.gift):
        request = replace(request, plot=plot.name)
    return request


def _with_article(rng: Random, noun: str) -> str:
    """A noun as a topic: mostly with "a", now and then with another word before it or in the plural."""
    draw = rng.random()
    if draw < 0.9:
        return article(noun)
    if draw < 0.95:
        return f"{pick(rng, ['the', 'my', 'some', 'one'])} {noun}"
    return plural(noun) if noun in NOUNS else article(noun)


def _figure_phrase(rng: Random, figure: Figure) -> str:
    if not figure.kind:
        return figure.name
    if figure == Figure(kind=figure.kind):
        return _with_article(rng, figure.kind)
    phrase = article(f"{figure.trait} {figure.kind}".strip())
    if not figure.name:
        return phrase
    if chance(rng, 0.15):
        return f"[my|the] {figure.trait} {figure.kind} {figure.name}".replace("  ", " ")
    return f"{phrase} [called|named|with the name] {figure.name}" if chance(rng, 0.8) else f"{figure.name}, {phrase}"


def phrase(rng: Random, request: Request) -> str:
    """The request in a user's words."""
    figures = [figure for figure in (request.hero, request.friend, request.third) if figure != Figure()]
    topics = [_figure_phrase(rng, figure) for figure in figures]
    if request.hero.kind and request.friend.kind and not request.friend.name and chance(rng, 0.15):
        his = "her" if is_female(request.hero.name, request.hero.kind) else "his"
        topics[1] = f"{his} {request.friend.kind}"
    if request.thing:
        topics.append(
            _with_article(rng, request.thing) if not request.look else article(f"{request.look} {request.thing}")
        )
    if request.gift:
        topics.append(article(request.gift))
    if request.theme:
        topics.append(request.theme)
    if request.plot:
        topics.append(next(plot.topic for plot in PLOTS if plot.name == request.plot))
    scene = ""
    if request.place:
        if topics and chance(rng, 0.6):
            scene = f" {PLACES.get(request.place, 'in')} the {request.place}"
        else:
            topics.append(f"[the|the|{article(request.place).split()[0]}] {request.place}")
    if len(topics) == 1 and not request.long and chance(rng, 0.05) and topics[0] == article(request.hero.kind):
        return expand(f"[Tell me|I want|Please tell me|I would like|Give me|] {topics[0]} story", rng, {}).strip() + "."
    if request.hero.kind and request.thing and chance(rng, 0.02):
        wanted = ", ".join(request.mentions())
        return expand(
            f"[Tell me|Write|Make] a story with [these words|the words|the following words]: {wanted}", rng, {}
        )
    if not topics:
        return expand(SHARED["ANY_STORY"], rng, {}) + "."
    if len(topics) == 2 and request.thing and chance(rng, 0.15):
        alone = request.hero != Figure() and request.friend == Figure() and request.thing in topics[1]
        topic = f"{topics[0]} [with|who finds|who has] {topics[1]}" if alone else " and ".join(topics)
    elif chance(rng, 0.05):
        topic = ", ".join(topics)
    else:
        topic = " and ".join([", ".join(topics[:-1]), topics[-1]] if len(topics) > 1 else topics)
    topic += scene
    about = "[about|about|about|about|with|of]" if not request.plot and not request.theme else "about"
    template = SHARED["LONG_REQUEST" if request.long else "REQUEST"]
    text = capitalise(expand(template, rng, {"about": f"{about} {topic}", "topic": topic}))
    return text + ("?" if text.split()[0] in ("Can", "Could", "Would", "May", "Do", "How", "What") else ".")
