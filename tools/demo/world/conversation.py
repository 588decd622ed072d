"""Whole conversations: requests as a user types them, stories, questions about the latest one, and talk between.

A conversation is an endless stream of turns. Whoever reads it stops when its context is full.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

from tools.demo.world import talk, words
from tools.demo.world.grammar import article, capitalise, chance, expand, pick
from tools.demo.world.plots import PLOTS, SHARED
from tools.demo.world.stories import (
    Figure,
    Request,
    Story,
    coin_word,
    draw_kind,
    draw_name,
    draw_thing,
    held_out,
    tell,
)

STORY, QUESTION, OTHER = "story", "question", "other"


@dataclass(frozen=True)
class Turn:
    """One exchange. `key` names the kind of question; `mentions` are the words that a story must contain."""

    user: str
    assistant: str
    kind: str
    key: str = ""
    mentions: tuple[str, ...] = ()


_OPENERS = frozenset(
    "What Where Who How Why Tell Can Could Would May Was Which A An Another Do One Whose Make Give Let Write Invent "
    "Then".split()
)


def typed(rng: Random, text: str) -> str:
    """`text` as people type it: often without capitals or the mark at the end, sometimes with a word before it."""
    if chance(rng, 0.06):
        before = pick(rng, ["So", "Okay", "And", "Hey", "Well", "Now", "Hmm", "Listen", "One more thing"])
        text = f"{before}, {text[0].lower() + text[1:] if text.split()[0] in _OPENERS else text}"
    if chance(rng, 0.3):
        text = text.lower()
    if chance(rng, 0.3):
        text = text.rstrip(".?!")
    elif chance(rng, 0.04):
        text += " please" if text[-1].isalnum() else ""
    return text or "?"


def draw_request(rng: Random, taken_names: set[str], evaluation: bool = False) -> Request:
    """A random request. With `evaluation` it names a hero and a thing that are held out as a pair."""
    plot = pick(rng, PLOTS)
    wants = {"hero"} if chance(rng, 0.75) else set()
    if chance(rng, 0.65) or evaluation:
        wants |= {"thing"}
    for part, share in (("friend", 0.25), ("place", 0.15), ("theme", 0.08), ("gift", 0.08), ("plot", 0.08)):
        if len(wants) < 3 and chance(rng, share):
            wants.add(part)
    if evaluation:
        wants = {"hero", "thing"} | ({"place"} & wants)

    request = Request()
    while True:
        kind, thing = draw_kind(rng), draw_thing(rng)
        if held_out(kind, thing) == evaluation:
            break
    if "hero" in wants:
        hero = Figure(kind=kind, trait=pick(rng, words.TRAITS) if chance(rng, 0.12) else "")
        if chance(rng, 0.15):
            hero = replace(hero, name=draw_name(rng, kind, taken_names))
        elif chance(rng, 0.1) and not evaluation:
            hero = Figure(name=draw_name(rng, "", taken_names))
        request = replace(request, hero=hero)
    if "friend" in wants:
        friend = kind
        while friend == kind:
            friend = draw_kind(rng)
        name = draw_name(rng, friend, taken_names | {request.hero.name}) if chance(rng, 0.2) else ""
        request = replace(request, friend=Figure(kind=friend, name=name))
    if "thing" in wants:
        look = pick(rng, words.COLOURS + words.LOOKS) if chance(rng, 0.12) else ""
        request = replace(request, thing=thing, look=look)
    if "gift" in wants:
        gift = thing
        while gift == thing:
            gift = draw_thing(rng)
        request = replace(request, gift=gift)
    if "place" in wants:
        request = replace(request, place=pick(rng, list(words.PLACES)))
    if "theme" in wants:
        request = replace(request, theme=pick(rng, list(words.MORALS)))
    if "plot" in wants and not (request.thing or request.gift):
        request = replace(request, plot=plot.name)
    return request


def _figure_phrase(rng: Random, figure: Figure) -> str:
    if not figure.kind:
        return figure.name
    phrase = article(f"{figure.trait} {figure.kind}".strip())
    return f"{phrase} [called|named] {figure.name}" if figure.name else phrase


def phrase(rng: Random, request: Request) -> str:
    """The request in a user's words."""
    topics = [_figure_phrase(rng, figure) for figure in (request.hero, request.friend) if figure != Figure()]
    if request.thing:
        topics.append(article(f"{request.look} {request.thing}".strip()))
    if request.gift:
        topics.append(article(request.gift))
    if request.theme:
        topics.append(request.theme)
    if request.plot:
        topics.append(next(plot.topic for plot in PLOTS if plot.name == request.plot))
    scene = ""
    if request.place:
        if topics and chance(rng, 0.6):
            scene = f" {words.PLACES[request.place]} the {request.place}"
        else:
            topics.append(f"[the|the|{article(request.place).split()[0]}] {request.place}")
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
    text = capitalise(expand(SHARED["REQUEST"], rng, {"about": f"{about} {topic}", "topic": topic}))
    return text + ("?" if text.split()[0] in ("Can", "Could", "Would", "May", "Do", "How", "What") else ".")


def _question_turn(rng: Random, stories: list[Story]) -> Turn:
    """A question about the latest story, now and then about an earlier one whose people it names."""
    earlier = len(stories) > 1 and chance(rng, 0.08)
    story = pick(rng, stories[:-1]) if earlier else stories[-1]
    question = story.ask(rng)
    while earlier and not (story.slots["h"] in question.text or story.slots["f"] in question.text):
        question = story.ask(rng)
    return Turn(typed(rng, question.text), question.answer, QUESTION, "earlier" if earlier else question.key)


def _stranger_turn(rng: Random, taken_names: set[str]) -> Turn:
    """A question about somebody who is in no story."""
    name = draw_name(rng, "", taken_names)
    text = expand(SHARED["STRANGER"], rng, {"n": name})
    return Turn(typed(rng, text), f"There is nobody called {name} in this story.", QUESTION, "stranger")


def _early_question(rng: Random) -> Turn:
    names = {"n": draw_name(rng, "", set()), "m": draw_name(rng, "", set())}
    text = expand(SHARED["EARLY"], rng, names)
    return Turn(typed(rng, text), talk.NO_STORY_YET, QUESTION, "early")


def _introduction(rng: Random) -> tuple[Turn, str]:
    name = coin_word(rng).capitalize() if chance(rng, 0.2) else draw_name(rng, "", set())
    said = expand(SHARED["INTRODUCTION"], rng, {"n": name})
    reply = expand("Nice to meet you, {n}! What should the story be about?", rng, {"n": name})
    return Turn(typed(rng, said), reply, OTHER), name


def _aside(rng: Random, exchange: tuple[str, str]) -> Turn:
    said, reply = exchange
    return Turn(typed(rng, said), reply, OTHER)


def conversation(rng: Random, evaluation: bool = False) -> Iterator[Turn]:
    """An endless conversation. With `evaluation` every story is about a held-out pair, and two questions follow."""
    taken_names: set[str] = set()
    stories: list[Story] = []
    user_name = ""
    if not evaluation and chance(rng, 0.3):
        if chance(rng, 0.15):
            turn, user_name = _introduction(rng)
            yield turn
        elif chance(rng, 0.15):
            yield _early_question(rng)
        else:
            said, reply = talk.small_talk(rng)
            if reply.startswith("That is the end") or reply.startswith("Thank you"):
                said, reply = talk.outside(rng)
            yield _aside(rng, (said, reply))
    while True:
        aside = rng.random()
        if stories or not evaluation:
            if aside < 0.14:
                yield _aside(rng, talk.small_talk(rng))
            elif aside < 0.28:
                yield _aside(rng, talk.outside(rng))
            elif user_name and aside < 0.35:
                said = pick(rng, ["What is my name?", "Do you know my name?", "Who am I?", "What's my name?"])
                yield Turn(typed(rng, said), f"Your name is {user_name}.", OTHER)
        request = draw_request(rng, taken_names, evaluation)
        story = tell(rng, request, taken_names, evaluation)
        stories.append(story)
        yield Turn(typed(rng, phrase(rng, request)), story.text, STORY, story.plot.name, tuple(request.mentions()))
        asked: set[str] = set()
        for _ in range(2 if evaluation else int(rng.random() * 6)):
            turn = _stranger_turn(rng, taken_names) if chance(rng, 0.04) else _question_turn(rng, stories)
            while turn.key in asked:
                turn = _question_turn(rng, stories)
            asked.add(turn.key)
            yield turn
            if chance(rng, 0.05):
                yield _aside(rng, talk.outside(rng))
