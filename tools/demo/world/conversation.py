"""Whole conversations: requests as a user types them, stories, questions about the latest one, and talk between.

A conversation is an endless stream of turns. Whoever reads it stops when its context is full.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

from tools.demo.world import questions, talk
from tools.demo.world.draw import ASKED, KNOWN, STRANGE, Pool
from tools.demo.world.grammar import chance, expand, pick
from tools.demo.world.keyboard import PLAIN, typed
from tools.demo.world.plots import SHARED
from tools.demo.world.questions import Question
from tools.demo.world.requests import draw_request, phrase
from tools.demo.world.stories import Figure, Request, Story, tell
from tools.demo.world.talk import Exchange

STORY, QUESTION, OTHER = "story", "question", "other"
MOST_QUESTIONS = 9
_OFFER = re.compile(r"(Would you like|Shall I tell|Shall I try)[^.?]*\?$")
_OFFERED = re.compile(r"a story about an? ([^?]*)\?$")


@dataclass(frozen=True)
class Turn:
    """One exchange. `key` names the question and `topic` its kind (of `questions.KINDS`); `form` is how it was typed.

    `mentions` are the words that a story must contain. `pattern` matches every right reply where there are several.
    `learned` is False for a story that is only read: its words are not those of a storyteller.
    """

    user: str
    assistant: str
    kind: str
    key: str = ""
    topic: str = ""
    form: str = PLAIN
    mentions: tuple[str, ...] = ()
    pattern: str = ""
    learned: bool = True

    def right(self, reply: str) -> bool:
        """Whether `reply` is a right one."""
        return bool(re.fullmatch(self.pattern, reply)) if self.pattern else reply == self.assistant


def as_typed(rng: Random, turn: Turn, form: str = "") -> Turn:
    """`turn` as a user types it; see `keyboard.typed`. One word decides what is told, and whether it is yes or no."""
    yes_or_no = turn.kind == QUESTION and turn.assistant.startswith(("Yes", "No"))
    user, form = typed(rng, turn.user, form, hard=bool(turn.mentions) or yes_or_no)
    return replace(turn, user=user, form=form)


def asked(question: Question) -> Turn:
    """The turn in which a question is put."""
    return Turn(question.text, question.answer, QUESTION, question.key, question.kind, pattern=question.pattern)


def said(exchange: Exchange) -> Turn:
    """The turn of a bit of talk."""
    return Turn(exchange.said, exchange.reply, OTHER, topic=exchange.kind, pattern=exchange.pattern)


class Conversation:
    """What has been said so far, and what may come next."""

    def __init__(self, rng: Random, evaluation: bool, unseen: Pool | None = None):
        self.rng = rng
        self.evaluation = evaluation
        self.unseen = unseen
        self.asked_pool = unseen or (KNOWN if evaluation else ASKED)
        self.names: set[str] = set()
        self.stories: list[Story] = []
        self.strange = False  # whether the latest story is full of words that nobody knows
        self.user_name = ""

    def first_turns(self) -> Iterator[Turn]:
        """What some users say before they ask for a story."""
        rng = self.rng
        while chance(rng, 0.3):
            draw = rng.random()
            if draw < 0.2:
                yield self._introduction()
            elif draw < 0.5:
                yield self.early_question()
            elif draw < 0.85:
                yield said(talk.small_talk(rng, before_a_story=True))
            else:
                yield said(talk.outside(rng))

    def story_turn(self, request: Request | None = None, text: str = "") -> Turn:
        """A request (`request` in the words `text`, or a new one) and its story."""
        rng = self.rng
        if request is None:
            request = draw_request(rng, self.names, self.evaluation, self.asked_pool)
            text = phrase(rng, request)
        self.strange = not self.evaluation and chance(rng, 0.25)
        pool = self.unseen or (STRANGE if self.strange else KNOWN)
        story = tell(rng, request, self.names, self.evaluation, pool)
        self.stories.append(story)
        mentions = tuple(request.mentions())
        learned = not (self.strange or self.unseen)
        return Turn(text, story.text, STORY, story.plot.name, mentions=mentions, learned=learned)

    def question_turn(self) -> Turn:
        """A question about the latest story, now and then about an earlier one whose people it names."""
        rng = self.rng
        if chance(rng, 0.07):
            name = pick(rng, [ASKED, STRANGE]).name(rng, "", self.names)
            return asked(questions.ask_for_stranger(rng, self.stories[-1], name))
        if self.strange and chance(rng, 0.06):
            # Told again, such a story has to be read: neither its words nor who is "she" can be guessed.
            return asked(questions.ask_any(rng, self.stories[-1], ("again",)))
        if not (len(self.stories) > 1 and chance(rng, 0.06)):
            return asked(questions.ask_any(rng, self.stories[-1]))
        if chance(rng, 0.3):
            return self.look_back()
        story = pick(rng, self.stories[:-1])
        while True:
            question = questions.ask_any(rng, story)
            if story.slots["h"] in question.text or story.slots["f"] in question.text:
                return replace(asked(question), key="earlier")

    def look_back(self) -> Turn:
        """What the first story or the one before the latest was about."""
        rng = self.rng
        first = len(self.stories) > 2 and chance(rng, 0.5)
        which = "first story" if first else "[story before|previous story|story before this one]"
        story = self.stories[0] if first else self.stories[-2]
        text = expand(f"What was the {which} about?", rng, {})
        return Turn(" ".join(text.split()), story.slots["SUM"], QUESTION, "earlier", "sentence")

    def questions_about_a_story(self, number: int) -> Iterator[Turn]:
        rng = self.rng
        keys: set[str] = set()
        while number > 0:
            turn = self.question_turn()
            if turn.key in keys:
                continue
            keys.add(turn.key)
            number -= 1
            yield turn
            if turn.key == "longer":
                self.stories[-1] = self.stories[-1].longer()
            elif turn.key not in ("earlier", "stranger", *questions.RETELLING):
                why = questions.reason(rng, self.stories[-1], turn.key)
                if chance(rng, 0.03 if why.answer == questions.UNKNOWN else 0.3):
                    yield asked(why)
            if chance(rng, 0.04):
                yield said(talk.outside(rng))

    def asides(self) -> Iterator[Turn]:
        """Talk between the stories; an offer of another one is often accepted."""
        rng = self.rng
        draw = rng.random()
        if draw < 0.25:
            turn = said(talk.small_talk(rng) if draw < 0.14 else talk.outside(rng))
            yield turn
            if _OFFER.search(turn.assistant) and chance(rng, 0.4):
                yield from self.answer_to_an_offer(turn.assistant)
        elif draw < 0.32 and self.user_name:
            text = pick(rng, ["What is my name?", "Do you know my name?", "Who am I?", "What's my name?", "My name?"])
            yield Turn(text, f"Your name is {self.user_name}.", OTHER, topic="small talk")

    def answer_to_an_offer(self, offer: str) -> Iterator[Turn]:
        """Yes and the story, or no."""
        rng = self.rng
        if chance(rng, 0.25):
            yield said(talk.declined(rng))
            return
        offered = _OFFERED.search(offer)
        request = Request()
        if offered:
            request = (
                Request(hero=Figure(kind=offered[1])) if offered[1] in KNOWN.animals else Request(thing=offered[1])
            )
        yield self.story_turn(request, talk.accepted(rng))

    def early_question(self) -> Turn:
        rng = self.rng
        story = tell(rng, Request(), None, self.evaluation)
        question = questions.ask_any(rng, story)
        return Turn(question.text, talk.NO_STORY_YET, QUESTION, "early", "not said")

    def _introduction(self) -> Turn:
        rng = self.rng
        self.user_name = ASKED.name(rng, "", set())
        text = expand(SHARED["INTRODUCTION"], rng, {"n": self.user_name})
        reply = f"Nice to meet you, {self.user_name}! What should the story be about?"
        return Turn(text, reply, OTHER, topic="small talk")


def conversation(rng: Random, evaluation: bool = False, unseen: Pool | None = None) -> Iterator[Turn]:
    """An endless conversation. With `evaluation` every story is about a held-out pair, and two questions follow.

    With `unseen`, too, the words of the stories are that pool's, such that no training text contains them.
    """
    talked = Conversation(rng, evaluation, unseen)
    for turn in () if evaluation else talked.first_turns():
        yield as_typed(rng, turn)
    while True:
        if talked.stories or not evaluation:
            for turn in talked.asides():
                yield as_typed(rng, turn)
        yield as_typed(rng, talked.story_turn())
        number = 2 if evaluation else int(rng.random() * MOST_QUESTIONS)
        for turn in talked.questions_about_a_story(number):
            yield as_typed(rng, turn)
