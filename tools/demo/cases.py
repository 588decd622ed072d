"""What the model is judged by: questions of every kind and requests in every form, about stories it has never seen.

Half of the stories are about a pair of hero and thing that is held out from training, the other half hold names,
animals, things, foods and places that no training text has.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from random import Random

from tools.demo.world import questions, talk
from tools.demo.world.conversation import Conversation, Turn, as_typed, asked, said
from tools.demo.world.draw import ACCENTED, NEVER_SEEN
from tools.demo.world.keyboard import CAPITALS, ERRORS, FORMS, LINES, PLAIN
from tools.demo.world.lexicon import invented

GROUPS = (
    *questions.KINDS, "bare why", "somebody unknown", "no story yet", "later turns", "small talk", "outside requests",
    CAPITALS, ERRORS, LINES, "accents",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A turn whose right reply is known, the turns before it, and the group under which it is counted."""

    group: str
    before: tuple[Turn, ...]
    turn: Turn


def _question(group: str, rng: Random, unseen: bool) -> Case | None:
    """A question of `group` as it comes in a conversation; None if the story drawn for it answers none."""
    words = ACCENTED if group == "accents" else NEVER_SEEN if unseen else None
    talked = Conversation(rng, evaluation=True, unseen=words)
    if group == "no story yet":
        return Case(group, (), as_typed(rng, talked.early_question(), PLAIN))
    if group in ("small talk", "outside requests"):
        story = (as_typed(rng, talked.story_turn()),)
        exchange = talk.small_talk(rng) if group == "small talk" else talk.outside(rng)
        return Case(group, story, as_typed(rng, said(exchange), PLAIN))
    before = [talked.story_turn()]
    if group == "later turns":
        before += [*talked.questions_about_a_story(3), said(talk.outside(rng)), talked.story_turn()]
    story = talked.stories[-1]
    if group in questions.KINDS and not questions.facts_of(story)[group]:
        return None
    if group == "bare why":
        while True:
            first = questions.ask_any(rng, story)
            turn = questions.reason(rng, story, first.key)
            if first.key not in questions.RETELLING and (turn.answer != questions.UNKNOWN or rng.random() < 0.02):
                before.append(asked(first))
                break
    elif group == "somebody unknown":
        turn = questions.ask_for_stranger(rng, story, NEVER_SEEN.name(rng, "", talked.names))
    elif group == "accents":
        turn = questions.ask_any(rng, story, ("names", "who", "yes or no", "what", "again", "shorter"))
    else:
        turn = questions.ask_any(rng, story, (group,) if group in questions.KINDS else None)
        if group not in questions.KINDS and rng.random() < 0.5:
            before += talked.questions_about_a_story(1)
    form = group if group in FORMS else PLAIN
    return Case(group, tuple(as_typed(rng, t, PLAIN) for t in before), as_typed(rng, asked(turn), form))


def question_cases(per_group: int, seed: int, groups: tuple[str, ...] = GROUPS) -> list[Case]:
    """`per_group` cases of each group, every second one with unseen words."""
    cases = []
    for group in groups:
        drawn, wanted = 0, len(cases) + per_group
        while len(cases) < wanted:
            rng = Random(seed + 1_000_000 * GROUPS.index(group) + drawn)
            case = _question(group, rng, unseen=drawn % 2 == 1)
            drawn += 1
            if case is not None:
                cases.append(case)
    return cases


def request_cases(number: int, seed: int) -> list[Case]:
    """Requests for stories: half about held-out pairs, half with unseen words; every second one typed badly.

    After these, one for ten of them with accents.
    """
    cases = []
    for i in range(number):
        rng = Random(seed + i)
        form = FORMS[(i // 2) % 6] if (i // 2) % 6 < len(FORMS) else PLAIN
        turn = Conversation(rng, evaluation=True, unseen=NEVER_SEEN if i % 2 == 0 else None).story_turn()
        cases.append(Case(form, (), as_typed(rng, turn, form)))
    for i in range(number, number + number // 10):
        rng = Random(seed + i)
        turn = Conversation(rng, evaluation=True, unseen=ACCENTED).story_turn()
        cases.append(Case("accents", (), as_typed(rng, turn, PLAIN)))
    return cases


def lacking(case: Case, reply: str) -> list[str]:
    """The words that a story should mention and does not. A part of another word is none: no "ant" is in "wanted"."""
    return [word for word in case.turn.mentions if not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", reply)]


def invented_words(case: Case, reply: str) -> set[str]:
    """Words of a story that are neither the world's nor in the request as it was meant."""
    return invented(reply, case.turn.user + " " + " ".join(case.turn.mentions))


def exact_shares(results: list[tuple[Case, str]]) -> dict[str, float]:
    """The share of right replies in each group."""
    right, total = Counter[str](), Counter[str]()
    for case, reply in results:
        total[case.group] += 1
        right[case.group] += case.turn.right(reply)
    return {group: right[group] / total[group] for group in total}
