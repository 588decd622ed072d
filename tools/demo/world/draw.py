"""Draws words for a story: from the lists of the world, coined ones that nobody has heard before, or unseen ones."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from zlib import crc32

from tools.demo.world import nouns, words
from tools.demo.world.grammar import chance, pick
from tools.demo.world.lexicon import WORDS, like_a_slip

THING, FOOD = "thing", "food"

TOOLS = nouns.LIGHTS + list(nouns.LOUD) + nouns.LONG  # things that help in their own way
THINGS = nouns.PLAIN_THINGS + TOOLS + nouns.TOYS_AND_VEHICLES
PEOPLE = nouns.PEOPLE + nouns.WOMEN + nouns.MEN
PLACES = nouns.PLACES | nouns.UNSEEN_PLACES | nouns.UNSEEN_ACCENTED_PLACES
FOODS = frozenset(nouns.FOODS + nouns.UNSEEN_FOODS + nouns.UNSEEN_ACCENTED_FOODS)
_UNSEEN_FEMALE_NAMES = nouns.UNSEEN_FEMALE_NAMES + nouns.UNSEEN_ACCENTED_FEMALE_NAMES
_UNSEEN_MALE_NAMES = nouns.UNSEEN_MALE_NAMES + nouns.UNSEEN_ACCENTED_MALE_NAMES
FEMALE_NAMES = frozenset(words.FEMALE_NAMES + words.SPELT_FEMALE_NAMES + _UNSEEN_FEMALE_NAMES)
MALE_NAMES = frozenset(words.MALE_NAMES + words.SPELT_MALE_NAMES + _UNSEEN_MALE_NAMES)
SPELT_NAMES = sorted(words.SPELT_FEMALE_NAMES + words.SPELT_MALE_NAMES)
UNSEEN = frozenset(
    nouns.UNSEEN_ANIMALS + nouns.UNSEEN_THINGS + nouns.UNSEEN_FOODS + list(nouns.UNSEEN_PLACES)
    + nouns.UNSEEN_ACCENTED_ANIMALS + nouns.UNSEEN_ACCENTED_THINGS + nouns.UNSEEN_ACCENTED_FOODS
    + list(nouns.UNSEEN_ACCENTED_PLACES) + [name.lower() for name in _UNSEEN_FEMALE_NAMES + _UNSEEN_MALE_NAMES]
)  # fmt: skip
NOUNS = frozenset(nouns.ANIMALS + PEOPLE + THINGS + nouns.FOODS + list(nouns.PLACES))
_TAKEN = NOUNS | UNSEEN | frozenset(name.lower() for name in FEMALE_NAMES | MALE_NAMES)
_HALVES = [noun for noun in sorted(NOUNS) if noun.isalpha() and len(noun) > 4]

_ONSETS = """b bl br c ch cl cr d dr f fl fr g gl gr h j k kl kn kr l m n p pl pr qu r s sc sh sk sl sm sn sp st str sw
t th tr tw v w wh wr y z""".split()
_VOWELS = "a a a e e e i i i o o o u u ai ay ea ee ie oa oo ou ow y".split()
_CODAS = """b ck d ff g k l ll lt m mp n nd ng nk nt p r rd rf rk rm rn rt s sh ss st t th x zz bble er et in is le on
or us ix ox""".split()
# Letters outside English: each has one upper-case form of one letter, so that capitals can be read back.
_ACCENTED = {
    "a": "áàâäãåąăāæ", "c": "çćč", "d": "ďđ", "e": "éèêëęěē", "g": "ğ", "i": "íìîïī", "l": "łľ", "n": "ñńň",
    "o": "óòôöõøőōœ", "r": "řŕ", "s": "śšş", "t": "ťţ", "u": "úùûüůűū", "y": "ýÿ", "z": "źżž",
}  # fmt: skip
# Letters of other scripts, from which a name is put together now and then: it is to be copied, whatever it says.
_SCRIPTS = (
    "абвгдежзийклмнопрстуфхчшыьэюя",
    "αβγδεζηθικλμνοπρτυφχψω",
    "あいうえおかきくけこさしすせそたちつてとなにのはひふほまみめもやゆよらりるれろわん",
    "明美子太郎花空海山川月星光愛学木林田中大小春秋雪雨金一二三文心東京",
)


def _with_accents(rng: Random, word: str) -> str:
    """`word` with one or two letters that English does not have, where it has letters for them."""
    places = [i for i, letter in enumerate(word) if letter in _ACCENTED]
    for _ in range(pick(rng, [1, 1, 2])):
        if places:
            at = places.pop(int(rng.random() * len(places)))
            word = word[:at] + pick(rng, _ACCENTED[word[at]]) + word[at + 1 :]
    return word


def coin_word(rng: Random) -> str:
    """A word that nobody has heard before: new syllables, or the halves of two nouns; some have accents.

    It is no word of the world with one letter more, less or other, since that is what a slip of the finger looks like.
    """
    while True:
        if chance(rng, 0.4):
            left, right = pick(rng, _HALVES), pick(rng, _HALVES)
            word = left[: 2 + int(rng.random() * (len(left) - 3))] + right[2 + int(rng.random() * (len(right) - 4)) :]
        else:
            syllables = [pick(rng, _ONSETS) + pick(rng, _VOWELS) for _ in range(1 + int(rng.random() * 3))]
            word = "".join(syllables) + (pick(rng, _CODAS) if len(syllables) == 1 or chance(rng, 0.6) else "")
        if word in _TAKEN or word in WORDS or not 3 <= len(word) <= 12 or like_a_slip(word):
            continue
        word = _with_accents(rng, word) if chance(rng, 0.1) else word
        if word not in UNSEEN:
            return word


def coin_name(rng: Random) -> str:
    """A name that the model has to spell: a common one, or one that nobody has heard before."""
    draw = rng.random()
    if draw < 0.4:
        return pick(rng, SPELT_NAMES)
    if draw < 0.44:
        letters = pick(rng, _SCRIPTS)
        return "".join(pick(rng, letters) for _ in range(2 + int(rng.random() * 5))).capitalize()
    first = coin_word(rng).capitalize()
    if draw > 0.9:
        return f"{first}{pick(rng, ' -')}{coin_word(rng).capitalize()}"
    return first


def coin_noun(rng: Random) -> str:
    """A coined word, or two words that nobody has heard together: the second one has to be copied, too."""
    while chance(rng, 0.3):
        noun = " ".join(pick(rng, _HALVES) if chance(rng, 0.5) else coin_word(rng) for _ in range(2))
        if noun not in NOUNS and noun not in UNSEEN:
            return noun
    return coin_word(rng)


def is_female(name: str, kind: str) -> bool:
    """Whether a story says "she" of somebody.

    Of a coined name, the letters do not tell: where the story is told again, it has to be read.
    """
    if kind in nouns.WOMEN or kind in nouns.MEN:
        return kind in nouns.WOMEN
    return name in FEMALE_NAMES or (name not in MALE_NAMES and crc32(name.encode()) % 2 == 0)


@dataclass(frozen=True)
class Pool:
    """Lists to draw from; `coined` is the share of words that are new instead."""

    animals: list[str]
    things: list[str]
    foods: list[str]
    places: list[str]
    female_names: list[str]
    male_names: list[str]
    coined: float = 0.0

    def thing(self, rng: Random, classes: tuple[str, ...] = (THING, FOOD)) -> str:
        if FOOD in classes and (THING not in classes or chance(rng, 0.2)):
            return pick(rng, self.foods)
        if chance(rng, self.coined):
            return coin_noun(rng)
        return pick(rng, TOOLS if chance(rng, 0.12) and self.things is THINGS else self.things)

    def kind(self, rng: Random) -> str:
        if chance(rng, self.coined):
            return coin_noun(rng)
        return pick(rng, self.animals) if chance(rng, 0.7) else pick(rng, PEOPLE)

    def place(self, rng: Random) -> str:
        return coin_noun(rng) if chance(rng, self.coined) else pick(rng, self.places)

    def name(self, rng: Random, kind: str, taken: set[str]) -> str:
        """A name that suits the kind and does not occur in `taken`."""
        while True:
            if chance(rng, self.coined):
                name = coin_name(rng)
            elif kind in nouns.WOMEN or (kind not in nouns.MEN and chance(rng, 0.5)):
                name = pick(rng, self.female_names)
            else:
                name = pick(rng, self.male_names)
            if name not in taken:
                return name


KNOWN = Pool(
    nouns.ANIMALS, THINGS, nouns.FOODS, list(nouns.PLACES), words.FEMALE_NAMES, words.MALE_NAMES
)  # fmt: skip
ASKED = Pool(
    nouns.ANIMALS, THINGS, nouns.FOODS, list(nouns.PLACES), words.FEMALE_NAMES, words.MALE_NAMES, coined=0.3
)  # fmt: skip
STRANGE = Pool(
    nouns.ANIMALS, THINGS, nouns.FOODS, list(nouns.PLACES), words.FEMALE_NAMES, words.MALE_NAMES, coined=0.75
)  # fmt: skip
NEVER_SEEN = Pool(
    nouns.UNSEEN_ANIMALS, nouns.UNSEEN_THINGS, nouns.UNSEEN_FOODS, list(nouns.UNSEEN_PLACES),
    nouns.UNSEEN_FEMALE_NAMES, nouns.UNSEEN_MALE_NAMES,
)  # fmt: skip
ACCENTED = Pool(
    nouns.UNSEEN_ACCENTED_ANIMALS, nouns.UNSEEN_ACCENTED_THINGS, nouns.UNSEEN_ACCENTED_FOODS,
    list(nouns.UNSEEN_ACCENTED_PLACES), nouns.UNSEEN_ACCENTED_FEMALE_NAMES, nouns.UNSEEN_ACCENTED_MALE_NAMES,
)  # fmt: skip
