"""Small talk, and requests from outside the text world with friendly answers that say what the model can do."""

from __future__ import annotations

from random import Random

from tools.demo_world import words
from tools.demo_world.grammar import article, capitalise, expand, pick
from tools.demo_world.stories import PEOPLE, THINGS, coin_word

MODEL_NAME = "Trit"

CAN = "[I can tell short stories and answer questions about them|I tell short stories and answer questions about them" \
    "|I only know how to tell short stories and to answer questions about them]."  # fmt: skip
TRY = '[Try: "{example}"|You could say: "{example}"|For example, say: "{example}"|Just say: "{example}"]'
OFFER = "[Would you like a story|Shall I tell you a story|What should the next story be about]?"

# What a user may say (lower case: the typist decides about capitals), and what the model answers.
SMALL_TALK = [
    ("[hello|hi|hey|hello there|hi there|hey there|good morning|good evening|good afternoon|good day|greetings|"
     "howdy|hallo]"
     "[| {model}|!|, {model}!]",
     "[Hello|Hi|Hello there|Hi there]! [What should the story be about|Would you like to hear a story|Shall I tell "
     "you a story]?"),
    ("[how are you|how are you doing|how do you do|how are you today|are you well|how is it going|what's up|"
     "everything okay]?",
     "[I am fine|I am very well|I feel great], thank you! {OFFER}"),
    ("[what can you do|what can you do for me|what do you do|how can you help me|what can i ask you|what do you "
     "know|help"
     "|how does this work|what are you able to do|what can i do here|what should i ask|what can i say|can you help "
     "me]?",
     "{CAN} {TRY}"),
    ("[who are you|what are you|what is your name|what's your name|do you have a name|tell me your name|tell me "
     "about yourself"
     "|are you a [robot|computer|person|human|machine]|are you an ai|introduce yourself|who am i talking to]?",
     "I am {model}, a very small storyteller [with ternary weights|made of ternary numbers]. {CAN}"),
    ("[thank you|thanks|thank you very much|thanks a lot|many thanks|thx|ok thanks|great, thanks|thank you so much|"
     "cheers]"
     "[|!|, {model}!]",
     "[You are welcome|You are very welcome|It was a pleasure|My pleasure]! {OFFER}"),
    ("[that was [nice|lovely|great|beautiful|a nice story|a lovely story|a good story|fun|funny]|i [liked|loved|"
     "like|love] "
     "[it|that|the story|this story]|what a [nice|lovely|great] story|nice|great|cool|wonderful|good story|well "
     "done|wow]"
     "[|!|.]",
     "[Thank you|I am glad that you liked it|How nice of you]! [Would you like another one|Shall I tell you another "
     "one]?"),
    ("[i did not like it|i don't like it|that was boring|that was bad|boring|i didn't like that story|bad story|not "
     "good"
     "|that was too short|i don't like this story|that makes no sense|that is wrong|you are wrong|wrong]",
     "I am sorry. [Shall I try another one|Would you like a different one]?[ Tell me what it should be about.|]"),
    ("[goodbye|bye|bye bye|good night|see you|see you later|see you tomorrow|farewell|i have to go|i must go now|ciao|"
     "that's all|that is all for today]"
     "[|!|, {model}!]",
     "[Goodbye|Bye|See you soon]! [Come back for another story|It was nice to talk to you|Sleep well and dream of "
     "good stories]."),
    ("[ok|okay|yes|yes please|sure|alright|fine|go on|i see|hm|hmm|well|aha|oh|no|no thanks|not now|maybe|maybe "
     "later|lol|haha]"
     "[|.|!]",
     "[Very well|All right]! What should the next story be about? {TRY}"),
    ("[what happened next|and then|what happens next|go on with the story|continue|continue the story|tell me more|more"
     "|how does it go on|is there more|and what happened then|can you make it longer]?",
     "That is the end of the story. [Would you like another one|Shall I tell you another one]?"),
    ("[do you like stories|what is your favourite story|do you have friends|are you happy|do you sleep|how old are you"
     "|where do you live|where are you from|who made you|what do you eat|do you like [cats|dogs|music|cake|me]|are "
     "you smart"
     "|can you feel|what is your favourite [animal|colour|food|place]|do you love me|are you real|do you dream]?",
     "I am only a small storyteller, so I cannot say much about that. {CAN}"),
    ("[tell me a joke|do you know a joke|make me laugh|tell me a riddle|sing a song|sing me a song|sing for me|"
     "dance for me"
     "|play a game with me|let's play a game|play music|can you sing|do you know a [riddle|song|game]]",
     "I am sorry, I only know stories. {TRY}"),
]  # fmt: skip

OUTSIDE = [
    ("sums", "[[what is|what's|how much is|calculate|compute|tell me] {n} [+|-|*|/|x|plus|minus|times|divided by] {n}"
     "|{n} [+|-|*|/] {n}|solve [x + {n} = {n}|{n}x = {n}|this equation|the equation {n}x + {n} = {n}]"
     "|what is the [square root|square|half|double] of {n}|is {n} [a prime number|even|odd]|what is {n} percent of {n}"
     "|convert {n} [miles|feet|pounds|dollars] [to|into] [kilometres|metres|kilos|euros]|help me with my [maths|"
     "math] [homework|]"
     "|what is the [integral|derivative] of x^{n}|how many [seconds|minutes|days] are in {n} [hours|weeks|years]]"),
    ("code", "[[write|write me|can you write|give me|show me] [a|some] [python|java|c|rust|javascript|sql|html|] "
     "[function|program|script|code|class|query|loop] [|that [sorts a list|reads a file|prints hello world|adds two "
     "numbers"
     "|finds primes|downloads a page]|for [sorting|a website|a game|{thing}s]]|fix [my code|this bug|this program]"
     "|what is [a for loop|a pointer|recursion|python|linux|docker|git|an api]|how do i [install|use|compile|debug] "
     "[python|linux|numba|cuda|git|docker|a package]|import numpy as np|def main():|print(\"hello\")|explain this code"
     "|[what does|why does] this [code|program|error] [do|mean|crash]|debug this]"),
    ("news", "[what is [in the news|new|new today|going on in the world|happening in {country}]|who is [the "
             "president|the king|the leader] of "
     "{country}|who won the [election|world cup|game|race|match] [|yesterday|last year|in {year}]|what happened in "
     "{year}"
     "|tell me the [latest |]news|what is the [stock|oil|gold|bitcoin] price|what do you think about [politics|the "
     "war|the election]]"),
    ("the weather", "[[what is|how is|what's] the weather [like |][today|tomorrow|in {country}|outside|now]|will it "
                    "[rain|snow|be hot] "
     "[today|tomorrow|this week]|weather forecast[| for {country}]|what is the temperature [outside|in {country}|today]"
     "|do i need an umbrella today|what time is it[| now| in {country}]|what day is it[| today]|what is the date[| "
     "today]]"),
    ("facts", "[what is the capital of {country}|where is {country}|how big is [the sun|the moon|{country}|the earth]"
     "|how many people live in {country}|when was [the moon landing|{famous} born|the great war]|who was {famous}|"
     "who invented the {thing}"
     "|how does a {rare} work|what is [gravity|a black hole|photosynthesis|democracy|an atom|electricity|dna|"
     "philosophy|inflation]"
     "|why is the sky blue|why do [cats purr|birds sing|we sleep|leaves fall]|how far is [the moon|the sun|{country}]"
     "|explain [quantum physics|relativity|evolution|the internet|bitcoin|machine learning|neural networks|chess]"
     "|how fast can a {kind} run|how long do {kind}s live|what do {kind}s eat|what is the [tallest|oldest|biggest|"
     "longest] [mountain|river|city|"
     "animal|tree]|what is the meaning of life|tell me [something |][about|all about] {country}|tell me a fact "
     "about [{kind}s|{country}]"
     "|who wrote [hamlet|the odyssey|faust|that book]|what language do they speak in {country}|define [love|time|"
     "{thing}]]"),
    ("writing of that kind", "[[write|write me|can you write|compose|give me] [a|an|some|me a] [poem|essay|letter|"
                             "email|song|rap|limerick|report|speech|review"
     "|resume|summary|novel|haiku|blog post|tweet|advertisement|cover letter] [|about {a_thing}|about {country}|for "
     "my [boss|friend|mother|teacher]"
     "|about [love|winter|the sea]]|correct my [grammar|text|essay]|rewrite this [sentence|text]|summarise this "
     "[text|article|book]"
     "|translate [{thing}|good morning|hello|this|my letter] [into|to] [french|german|spanish|chinese|latin|english|"
     "japanese]"
     "|how do you say {thing} in [french|german|spanish|italian]|what does {thing} mean in [french|german|spanish]"
     "|[spell|rhyme] [{thing}|the word {thing}]|what rhymes with {thing}]"),
    ("advice", "[how do i [cook rice|bake a cake|fix my car|lose weight|find a job|make money|learn french|train my "
               "dog|clean a {thing}|tie a tie"
     "|get rich|sleep better|build a {thing}|repair a {thing}|draw a {kind}]|how can i [make|cook|clean|fix|sell|"
     "buy] [a|my] {thing}"
     "|what should i [eat|wear|do|read|cook|buy|watch] [today|tonight|tomorrow|]|recommend [a book|a film|a "
     "restaurant|a game|some music]"
     "|where can i buy {a_thing}|i have a [headache|cold|problem|question]|i feel [sad|ill|bored|tired|lonely]|"
     "should i [quit my job|buy a car|move to {country}]"
     "|book a [flight|hotel|table] [to {country}|for two|for tomorrow]|order a pizza|call my [mother|friend]|set "
     "[an alarm|a timer]"
     "|turn on the [light|radio|heating]|open the [door|window|app]|play [some music|a film]|send an email|show me "
     "a picture of {a_kind}"
     "|draw {a_kind}|paint {a_thing}|give me [a recipe|a recipe for soup|directions to {country}|your phone number|"
     "money]|search the web for {thing}s]"),
    ("", "[{junk}|{junk} {junk}|{junk} {junk} {junk}|{n}|{n} {n} {n}|[blah|bla] bla bla|asdf|qwerty|test|testing|"
         "test 123|???|...|!!!|abc|xyz|lorem ipsum"
     "|[the|a|my|your|this] {thing}[ is {colour}| is broken| is on the table|]|i [have|saw|like|bought] {a_thing}|"
     "my {kind} is [called {name}|ill|hungry]"
     "|i am [hungry|bored|a {person}|{n} years old|at home|at work]|it is [raining|late|cold|{n} degrees] [here|"
     "today|outside]"
     "|[i think|i believe|did you know] that {kind}s can [fly|sing|swim|read]|{kind}s are [nice|my favourite "
     "animals]|[it's|it is] a nice day]"),
]  # fmt: skip
COUNTRIES = words.items("""France, Germany, Italy, Spain, Norway, Japan, China, India, Brazil, Canada, Egypt, Kenya,
Peru, Mexico, Russia, Poland, Greece, Turkey, London, Paris, Berlin, Rome, Tokyo, New York, Australia, America,
England, Chile""")
FAMOUS = words.items("""Einstein, Napoleon, Mozart, Cleopatra, Shakespeare, Newton, Darwin, Beethoven, Columbus,
Gandhi, Picasso, Galileo, Plato, Julius Caesar, Marie Curie, Alan Turing, Ada Lovelace, Goethe, Aristotle,
Leonardo da Vinci""")

_SORRY = {
    "sums": "I am sorry, I am not good at sums.",
    "code": "I am sorry, I cannot write programs.",
    "news": "I am sorry, I do not know the news.",
    "the weather": "I am sorry, I do not know what it is like outside.",
    "facts": "I am sorry, I do not know much about the real world.",
    "writing of that kind": "I am sorry, I cannot write that.",
    "advice": "I am sorry, I cannot help you with that.",
    "": "I am not sure what you mean.",
}
NO_STORY_YET = "I have not told you a story yet. What should it be about?"


def example_request(rng: Random) -> str:
    return f"Tell me a story about {article(pick(rng, words.ANIMALS))} and {article(pick(rng, THINGS))}."


def _slots(rng: Random) -> dict[str, str]:
    thing, kind = pick(rng, THINGS + words.FOODS), pick(rng, words.ANIMALS)
    return {
        "model": MODEL_NAME,
        "CAN": CAN,
        "TRY": TRY,
        "OFFER": OFFER,
        "example": example_request(rng),
        "n": str(int(10 ** (4 * rng.random()))),
        "year": str(1000 + int(1030 * rng.random())),
        "thing": thing,
        "a_thing": article(thing),
        "rare": pick(rng, words.RARE_THINGS),
        "kind": kind,
        "a_kind": article(kind),
        "person": pick(rng, PEOPLE),
        "name": pick(rng, words.MALE_NAMES),
        "colour": pick(rng, words.COLOURS),
        "country": pick(rng, COUNTRIES),
        "famous": pick(rng, FAMOUS),
        "junk": coin_word(rng),
    }


def small_talk(rng: Random) -> tuple[str, str]:
    """Something friendly that a user may say, and the reply."""
    said, reply = pick(rng, SMALL_TALK)
    slots = _slots(rng)
    return capitalise(expand(said, rng, slots)), expand(reply, rng, slots)


def outside(rng: Random) -> tuple[str, str]:
    """A request from outside the text world, and a friendly answer that says what the model can do."""
    topic, said = pick(rng, OUTSIDE)
    slots = _slots(rng)
    mark = pick(rng, ["", "", ".", "?"]) if topic != "" else ""
    return " ".join(expand(said, rng, slots).split()) + mark, expand(_SORRY[topic] + " {CAN} {TRY}", rng, slots)
