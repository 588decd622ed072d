"""The lexicon of the text world: who may appear, with what, where, and how they feel."""

from __future__ import annotations

from tools.demo.world.nouns import items

FEMALE_NAMES = """Ada Alma Anna Bella Bea Cara Carla Celia Clara Cora Daisy Dora Edith Ella Elsa Emma Enid Erin Eva
Faye Fern Flora Freya Gemma Gina Greta Hanna Hazel Heidi Ida Ina Iona Ivy Jana June Kaia Kira Lara Lena Lila Lily
Lina Lola Lotta Lucy Luna Mabel Maja Mara Maya Mia Mila Mina Mira Molly Nadia Nell Nina Nora Olga Olive Pia Polly
Rita Rosa Ruby Runa Sara Selma Sofia Stella Suri Tara Thea Tilda Tina Uma Vera Wanda Willa Yara Zara Zoe""".split()

MALE_NAMES = """Abel Adam Alfie Amir Anton Arlo Axel Ben Bert Boris Bruno Carl Caspar Cato Dan David Elio Emil Enzo
Erik Ezra Felix Finn Frank Fred Georg Gus Hans Harry Henry Hugo Igor Ivan Jack Jakob Jasper Jim Joel John Jonah Juri
Karl Kim Kurt Leo Levi Liam Linus Luka Luke Magnus Mark Martin Max Milo Ned Nico Noah Odin Oleg Omar Oscar Otto Owen
Paul Peter Pip Quentin Ralf Remy Rolf Rory Rufus Sam Simon Sven Ted Theo Tim Toby Tom Tony Udo Viktor Walter Yuri
Zack""".split()

# Names that users may ask for. Stories have them only then; they are no tokens, but spelt, and tell "he" or "she".
SPELT_FEMALE_NAMES = """Abigail Aisha Alice Alicia Alina Amanda Amelia Amina Amy Angela Anita Annabel Anne Annie
Antonia Ariana Audrey Aurora Ava Barbara Beatrice Betty Bianca Bonnie Carmen Caroline Catherine Cecilia Charlotte
Chiara Christina Cindy Clarissa Claudia Daniela Daphne Deborah Diana Donna Dorothy Eleanor Elena Eliza Elizabeth
Ellen Eloise Emily Esther Eve Fatima Fiona Frances Francesca Gabriella Georgia Gloria Haley Hannah Helen Helena
Hermione Ingrid Irene Isabel Isabella Jane Janet Jasmine Jennifer Jessica Jill Joan Joanna Josie Judith Judy Julia
Juliet Karen Kate Katherine Kathleen Katie Kayla Kimberly Kirsten Kristina Laila Laura Layla Leah Leila Linda Lisa
Liz Lorena Louisa Louise Lydia Madeline Maggie Margaret Maria Mariana Marie Marina Martha Mary Maryam Megan Melanie
Melissa Meredith Michelle Minnie Miriam Moana Monica Nadine Nancy Naomi Natalie Natasha Nia Nicole Noelle Olivia
Pamela Patricia Paula Penelope Phoebe Priya Rachel Rebecca Renata Rosie Roxanne Sabrina Sally Salma Samantha Sandra
Sarah Savannah Scarlett Seraphina Sharon Sheila Shreya Sienna Sigrid Silvia Simone Sophia Sophie Susan Susanna
Suzanne Sylvia Tabitha Tamara Tanya Tatiana Teresa Tess Thelma Tiffany Trisha Trudy Valerie Vanessa Veronica
Victoria Vivian Wendy Wilma Xenia Yasmin Yvonne Zelda Zuzana""".split()

SPELT_MALE_NAMES = """Aaron Adrian Ahmed Aiden Alan Alberto Alexander Alexei Alistair Alvin Andrew Anil Anthony
Antonio Archie Arjun Arthur Barry Basil Benjamin Bilbo Billy Bobby Bradley Brandon Brendan Brian Bruce Bryan Byron
Callum Calvin Carlos Charles Christian Christopher Clarence Clive Colin Connor Curtis Damian Daniel Dennis Derek
Dexter Diego Dieter Donald Douglas Duncan Dylan Edward Elijah Elliot Ernest Ethan Fernando Francesco Franklin
Freddie Frodo Gabriel Galahad Gandalf Gary George Gerald Giovanni Gordon Graham Gregory Gustav Harold Haruto Harvey
Hassan Henri Herbert Hiroshi Howard Ian Ibrahim Isaac Ivo Jackson Jacob Jacques James Jason Javier Jeffrey Jeremy
Jerry Joe Johnny Jonas Jonathan Jonny Joseph Joshua Juan Julian Julius Justin Keith Kenji Kevin Khalid Klaus Kurtis
Kyle Lancelot Larry Lars Lawrence Lenny Lionel Lloyd Logan Louis Luca Lucas Luis Malcolm Marcel Marco Marek Mason
Mateo Matteo Matthew Maurice Maxwell Merlin Micah Michael Miguel Mikhail Minh Mitchell Mohammed Muhammad Nathan Neil
Nicholas Nigel Nikolai Nils Olaf Oliver Pablo Patrick Pavel Pedro Percy Phil Philip Pierre Preston Rafael Ragnar
Rahul Raj Ralph Rashid Ravi Raymond Reggie Ricardo Robert Roberto Rodney Roger Rohan Ronald Ross Roy Russell Ryan
Samuel Sanjay Scott Sean Sebastien Sergei Shane Spencer Stefano Stephen Steven Takeshi Tariq Thomas Timothy Tomasz
Trevor Troy Tyler Vijay Vincent Vladimir Wally William Winston Wolfgang Yusuf Zain Zane""".split()

TRAITS = items("""brave, shy, curious, gentle, clever, cheerful, sleepy, grumpy, lazy, kind, proud, lonely, quiet,
silly, patient, careful, honest, friendly, playful, polite, stubborn, dreamy, generous, helpful, hungry, lively,
loyal, merry, nervous, noisy, restless, serious, thoughtful, tidy, timid, wise, bold, busy, calm, forgetful,
impatient, hopeful""")

# How a story ends for its hero, and how things look before.
GLAD = items("""happy, proud, glad, grateful, cheerful, joyful, peaceful, content, delighted, thankful, calm, hopeful,
relieved, merry, pleased, lucky, very happy, very proud, full of joy""")
SAD = items("sad, worried, unhappy, upset, miserable, troubled, gloomy, downhearted")
AFRAID = items("afraid, frightened, scared, nervous, anxious, alarmed")

COLOURS = items("red, blue, green, yellow, white, black, brown, purple, orange, pink, grey, golden, silver")
LOOKS = items("""tiny, little, big, old, new, shiny, wooden, striped, spotted, pretty, strange, heavy, round, painted,
beautiful, dusty, simple, fine, unusual, enormous""")
FOOD_LOOKS = items(
    "big, small, sweet, fresh, warm, round, tasty, juicy, golden, special, delicious, enormous, ordinary"
)

PLACE_LOOKS = items("old, quiet, green, wide, sunny, distant, misty, little, great, hidden, beautiful, famous, windy")

WEATHER = items("""windy, sunny, rainy, snowy, foggy, cloudy, frosty, warm, chilly, stormy, bright, misty, cold, hot,
golden, grey, clear, mild""")
DAYTIMES = items("morning, afternoon, evening, day")
# Kinds of weather that nobody would call by each other's names: a wrong one for yes-or-no questions.
OTHER_WEATHER = {
    "windy": "sunny", "sunny": "rainy", "rainy": "sunny", "snowy": "hot", "foggy": "sunny", "cloudy": "sunny",
    "frosty": "hot", "warm": "snowy", "chilly": "hot", "stormy": "sunny", "bright": "foggy", "misty": "sunny",
    "cold": "hot", "hot": "snowy", "golden": "rainy", "grey": "sunny", "clear": "foggy", "mild": "snowy",
}  # fmt: skip

HOMES = items("""in a small house by the river, under an old oak tree, in a cosy cottage, at the edge of the woods,
on top of a green hill, in a house with a red door, at the end of a long lane, near a mill, in a tiny hut by the
lake, beside a wide meadow, behind a tall hedge, in a village by the sea, not far from the market, in a valley full
of flowers, under a bridge, in a tower with a round window, next to an apple orchard, in a house made of stone, at
the foot of a mountain, in a little boat on the canal, in a room above the bakery, beside a quiet road, in a tent by
the forest, near an old well, in a house with a crooked chimney, on a sunny farm, in a hollow log, under the roots
of a pine""")

HOBBIES = items("""climb trees, pick berries, draw pictures, sing songs, count the stars, collect stones, bake
bread, read old books, look at the clouds, tell jokes, dance in the rain, swim in the pond, plant flowers, play hide
and seek, watch the birds, build little boats, write poems, whistle tunes, make soup, jump over puddles, roll down
hills, listen to the wind, paint pebbles, watch the sunset, fish in the stream, sew clothes, mend old things, play
chess, gather nuts, sleep in the sun, ask questions, tell riddles, skip stones, ride downhill, chase leaves, make
friends""")

SPOTS = items("""under a bush, beside the path, in the tall grass, behind a tree, under a bench, between two rocks,
in a pile of leaves, at the bottom of a ditch, behind a low wall, on a tree stump, next to a puddle, in an empty
nest, under a wooden gate, behind a barrel, inside a hollow tree, near a fence, among the flowers, on a flat stone,
under a fallen branch, in the mud, in a corner, on a mossy log""")

# A lost little one: as the story first names it, and as a question does.
BABIES = [
    (f"a {size}{baby}", f"the {baby}")
    for size in ("", "tiny ", "little ")
    for baby in items("""duckling, kitten, puppy, lamb, gosling, chick, piglet, bear cub, fawn, foal, mouse, hedgehog,
    squirrel, penguin""")
]

# Where someone can be stuck: what happened, and the place as an answer gives it.
STUCK = [
    ("had fallen into a deep hole", "in a deep hole"),
    ("had slipped into a muddy ditch", "in a muddy ditch"),
    ("was hanging from a branch above the water", "on a branch above the water"),
    ("was sitting on a rock in the middle of the water", "on a rock in the water"),
    ("had tumbled into an empty well", "in an empty well"),
    ("had sunk deep into the mud", "in the mud"),
    ("had slid to the bottom of a steep bank", "at the bottom of a steep bank"),
    ("was caught in a thorny bush", "in a thorny bush"),
    ("had stepped onto a narrow ledge and did not dare to move", "on a narrow ledge"),
    ("had fallen through the floor of an old shed", "in an old shed"),
    ("was trapped between two big stones", "between two big stones"),
    ("had rolled into a pit full of leaves", "in a pit full of leaves"),
]

SHELTERS = items("""in a small cave, in an empty barn, under a wide oak, in a hollow tree, under an old bridge, in
a shed, under a big rock, in a windmill, in a ruined tower, under an upturned boat, in a hut, in a haystack""")

# How one cheers up a friend: as it is told, and as an answer says it.
CHEERS = [
    ("sang a funny song", "sang"),
    ("told a long story about the moon", "told a story"),
    ("made silly faces", "made silly faces"),
    ("told one joke after another", "told jokes"),
    ("hummed a soft tune", "hummed a tune"),
    ("played a guessing game with {f}", "played a guessing game"),
    ("counted the raindrops aloud", "counted the raindrops"),
    ("asked riddles", "asked riddles"),
    ("drew pictures on the ground", "drew pictures"),
    ("told {f} about the summer", "talked about the summer"),
]

GIVERS = items("grandmother, grandfather, uncle, aunt, cousin, neighbour, teacher, older sister, older brother")

WORKERS = items("""miller, baker, farmer, shoemaker, tailor, gardener, blacksmith, innkeeper, carpenter, potter,
weaver, beekeeper, clockmaker, librarian, toymaker""")
CHORES = items("""swept the floor, carried water, washed the windows, fed the hens, stacked the wood, pulled the
weeds, painted the fence, sorted the buttons, picked the apples, watered the plants, cleaned the shelves, polished
the tools, brushed the horses, raked the leaves, scrubbed the pots""")
PRICES = items("three coins, five coins, seven coins, ten coins, a silver coin, a gold coin, a handful of pennies")

CONTESTS = items("""running race, singing contest, baking contest, drawing contest, boat race, dancing contest,
spelling contest, jumping contest, cooking contest, swimming race, storytelling contest, sack race, flower show,
riddle contest, egg race, whistling contest""")

WISE_ONES = items("""wise old owl, tall old oak tree, talking fish, tiny fairy, old tortoise, silver moth,
friendly ghost, kind old woman, kind old man, shooting star, whispering well, grey heron, little star, white stag""")
BURDENS = items("""a heavy sack of flour, a tall stack of books, a bucket of water, a bundle of firewood, a big
basket of apples, a crate of pumpkins, a long wooden plank, three bags of potatoes, a huge bale of hay, a box of
dishes""")

SKILLS = items("""swim, sing, whistle, dance, bake bread, ride a bicycle, read, paint, juggle, skate, play the piano,
tie knots, row a boat, climb, do a handstand, write letters, knit, ski, play chess, sail, cook soup, fly a kite,
tell the time, count to a hundred, draw, weave baskets, do magic tricks, walk on stilts""")
TRIES = items("two, three, four, five, six, seven, eight, nine, ten")

# A noise in the night and what it turned out to be.
NOISES = [
    ("a loud knocking", "a loose shutter in the wind"),
    ("a strange howling", "the wind in an empty bottle"),
    ("a soft tapping", "a branch against a window"),
    ("a deep rumbling", "an old barrel rolling to and fro"),
    ("a long squeaking", "a gate that needed some oil"),
    ("a low humming", "a swarm of sleepy bees"),
    ("a sad whimpering", "a puppy that had lost its mother"),
    ("a quick scratching", "a mouse building a nest"),
    ("a wild splashing", "two ducks having a bath"),
    ("a loud snoring", "a tired old bear fast asleep"),
    ("a faint crying", "a kitten up on a roof"),
    ("a funny clinking", "a magpie sorting its spoons"),
    ("a heavy stomping", "a cow that had left its barn"),
    ("a high ringing", "a tiny bell on a lost lamb"),
]

ILLNESSES = items("a cold, a fever, a sore throat, a bad cough, a headache, a stomach ache, a sore foot, a runny nose")
CURES = items("""mint leaves, honey, lemons, fresh herbs, elderberries, ginger, chamomile flowers, clean water,
rose hips, sage leaves, warm milk, thyme""")

LANDMARKS = items("""under an old apple tree, behind the waterfall, below a crooked tree, under a round white stone,
beside a broken gate, at the end of a tunnel, inside a hollow log, under the third step, beneath a rusty anchor,
next to a stone lion, behind a curtain of ivy, between two tall pines""")
CLUES = items(
    "an old map, a secret note, a riddle, a strange letter, a faded drawing, a message in a bottle, an old song"
)

BROKEN = items("""fence, roof, boat, bridge, cart, chimney, gate, garden wall, swing, tree house, bed, clock,
oven, mill wheel, doll house, wagon""")
BREAKERS = items("the storm, the wind, a falling branch, a runaway goat, the heavy snow, the flood, a rolling stone")

# Theme of a story and the lesson that names it.
MORALS = {
    "friendship": "friendship is worth more than gold",
    "kindness": "kindness always comes back",
    "courage": "courage grows when you use it",
    "sharing": "sharing makes everything twice as nice",
    "honesty": "honesty is the best way",
    "patience": "patience brings good things",
    "helping": "helping others helps yourself too",
    "listening": "listening is as important as talking",
    "trust": "trust makes friends strong",
    "hope": "hope is a light in the dark",
    "forgiveness": "forgiveness makes the heart light",
    "generosity": "generosity needs no reason",
    "teamwork": "teamwork makes hard things easy",
    "gratitude": "gratitude turns little things into treasures",
    "laughter": "laughter chases fear away",
    "love": "love is stronger than any storm",
    "practice": "practice makes everyone better",
    "wonder": "wonder waits behind every corner",
    "bravery": "bravery can be very quiet",
    "giving": "giving is nicer than getting",
}

# What a story may say about its hero, and otherwise does not.
AGES = items("three, four, five, six, seven, eight, nine, ten, twelve, a hundred")
SIBLINGS = items("""two brothers, three brothers, four brothers, five brothers, two sisters, three sisters, four
sisters, five sisters, one brother, one sister, six brothers, seven sisters""")
DREAMS = items("""see the sea, fly to the moon, meet a king, find a treasure, climb the highest mountain, sail around
the world, ride a dragon, sing on a stage, build a tree house, travel by train, see the snow, learn to fly, write
a book, dance at a ball, catch a star, have a garden""")
