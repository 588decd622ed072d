"""The nouns of the text world: who and what may appear in a story, and where it may happen.

The training lists hold the commonest animals, toys, vehicles, foods and places of children's books. The lists named
`UNSEEN_...` hold words as ordinary which no training text contains: the evaluation tells stories about those, too.
"""

from __future__ import annotations


def items(text: str) -> list[str]:
    """The entries of a comma-separated list."""
    return [item.strip() for item in " ".join(text.split()).split(",") if item.strip()]


ANIMALS = items("""fox, owl, rabbit, bear, dog, cat, mouse, hedgehog, squirrel, badger, otter, beaver, frog, toad,
duck, goose, swan, hen, rooster, crow, sparrow, robin, pigeon, parrot, penguin, seal, turtle, tortoise, snail,
lizard, mole, deer, fawn, elk, moose, wolf, lion, tiger, leopard, panda, monkey, elephant, giraffe, zebra, camel,
donkey, horse, pony, cow, calf, sheep, lamb, goat, pig, piglet, llama, kangaroo, koala, raccoon, skunk, ferret,
hamster, puppy, kitten, duckling, chick, bat, ant, bee, beetle, butterfly, cricket, spider, crab, dragon, unicorn,
dinosaur, hare, weasel, stork, heron, peacock, eagle, gorilla, hippo, rhino, buffalo, ostrich, pelican, raven,
woodpecker, hummingbird, caterpillar, polar bear, brown bear, grizzly bear, bear cub, panda bear, wolf cub, lion
cub, tiger cub, fox cub, lioness, cheetah, jaguar, panther, puma, lynx, bobcat, hyena, jackal, coyote, dingo,
husky, poodle, beagle, terrier, collie, bulldog, greyhound, sheepdog, stallion, mare, foal, colt, mule, bull, ox,
bison, yak, ram, ewe, reindeer, antelope, gazelle, gnu, chimpanzee, baboon, orangutan, lemur, sloth, anteater,
armadillo, aardvark, platypus, possum, meerkat, mongoose, chipmunk, gopher, groundhog, guinea pig, gerbil, rat,
vole, shrew, porcupine, mink, stoat, marten, walrus, sea lion, sea otter, whale, blue whale, dolphin, porpoise,
shark, octopus, squid, jellyfish, starfish, seahorse, lobster, shrimp, clam, oyster, goldfish, trout, salmon,
herring, tuna, catfish, eel, carp, swordfish, stingray, clownfish, newt, salamander, gecko, chameleon, iguana,
crocodile, alligator, snake, python, cobra, rattlesnake, viper, tadpole, bullfrog, turkey, goat kid, drake,
gosling, cockerel, quail, partridge, pheasant, dove, seagull, albatross, puffin, flamingo, crane, kingfisher,
magpie, jay, starling, blackbird, finch, canary, budgie, cockatoo, toucan, swallow, lark, nightingale, wren,
cuckoo, falcon, hawk, vulture, buzzard, osprey, kestrel, emu, kiwi, condor, barn owl, snowy owl, ladybird,
ladybug, dragonfly, firefly, grasshopper, wasp, hornet, bumblebee, honeybee, moth, fly, mosquito, flea, worm,
earthworm, glowworm, slug, centipede, scorpion, locust, cicada, mammoth, phoenix, griffin, T-rex, pterodactyl""")

PEOPLE = items("""baker, farmer, sailor, knight, tailor, painter, gardener, teacher, doctor, miller, shepherd,
shoemaker, pilot, cook, carpenter, clockmaker, musician, dancer, singer, juggler, clown, pirate, robot, giant,
fairy, elf, gnome, dwarf, librarian, woodcutter, blacksmith, beekeeper, captain, student, traveller, astronaut,
firefighter, nurse, inventor, weaver, potter, toymaker, gatekeeper, ferryman, innkeeper, explorer, scientist,
poet, magician, troll, child, baby, ghost, monster, ogre, goblin, alien, vampire, zombie, superhero, ninja,
detective, hunter, soldier, chef, driver, dentist, vet, judge, lifeguard, gymnast, writer, artist, drummer,
engineer, builder, plumber, racing driver, train driver, police officer, scarecrow, wooden puppet, pixie, genie,
viking""")
WOMEN = items(
    "girl, queen, princess, witch, grandmother, milkmaid, mermaid, duchess, mother, ballerina, woman, sister, aunt"
)
MEN = items("boy, king, prince, wizard, grandfather, fisherman, postman, snowman, father, man, cowboy, brother, uncle")

# Things one can carry. The ones below with a use of their own help in their own way when someone is in trouble.
LIGHTS = items("lantern, lamp, candle, torch, flashlight")
LOUD = {"drum": "beat", "bell": "rang", "whistle": "blew", "horn": "blew", "trumpet": "blew", "flute": "played",
        "fiddle": "played", "tambourine": "shook", "rattle": "shook", "harp": "played", "gong": "struck",
        "trombone": "blew", "guitar": "played", "violin": "played", "piano": "played", "recorder": "played",
        "ukulele": "played", "banjo": "played", "accordion": "played", "saxophone": "played"}  # fmt: skip
LONG = items("rope, ribbon, scarf, blanket, ladder, stick, net, broom, belt, fishing rod, shawl, branch, rake, oar")
PLAIN_THINGS = items("""kite, flag, balloon, mirror, umbrella, mask, key, ball, book, map, compass, hat, coat,
mitten, boot, basket, cup, spoon, teapot, clock, coin, ring, crown, shell, feather, button, pebble, marble, star,
doll, puppet, teddy bear, toy train, toy boat, rocking horse, spinning top, music box, paintbrush, pencil, notebook,
letter, postcard, parcel, box, jar, bottle, bucket, watering can, shovel, hammer, wheel, cart, wagon, sled, pillow,
quilt, bag, backpack, purse, necklace, bracelet, pearl, gem, jewel, acorn, seed, flower, rose, sunflower, leaf,
pinecone, telescope, camera, magnifying glass, snow globe, kettle, pan, plate, comb, brush, needle, thimble,
cushion, chair, stool, bicycle, scooter, boat, raft, puzzle, card, picture, painting, statue, vase, wreath, garland,
locket, medal, stone, crystal, helmet, shield, sword, cape, cloak, glove, sock, slipper, apron, tent, toolbox,
ruler, magnet, toy robot, paper plane, birdhouse, flowerpot, suitcase, trunk, barrel, anchor, hourglass,
calendar, newspaper, diary, chalkboard, sponge""")
TOYS_AND_VEHICLES = items("""toy, toy car, toy truck, toy plane, toy horse, dollhouse, toy soldier, building block,
yo-yo, jigsaw, jigsaw puzzle, board game, skipping rope, frisbee, bubble wand, water pistol, beach ball, football,
soccer
ball, basketball, tennis ball, tennis racket, baseball bat, hula hoop, trampoline, swing, seesaw, slide,
sandcastle, skateboard, roller skate, ice skate, snowboard, surfboard, tricycle, unicycle, pogo stick, bike,
motorbike, car, race car, fire engine, fire truck, police car, ambulance, taxi, bus, school bus, van, truck,
lorry, digger, bulldozer, tractor, steam train, train, tram, steam engine, airplane, plane, helicopter, hot air
balloon, rocket, spaceship, ship, sailing boat, rowing boat, pirate ship, canoe, kayak, submarine, sleigh,
carriage, wheelbarrow, crayon, sticker, stamp, marker, paint box, dice, playing card, snowball, snowflake,
rainbow, cloud, moonbeam, tree, egg, nest, candy, wand, magic wand, magic carpet, magic lamp, potion, spellbook,
magic bean, treasure chest, treasure map, throne, crystal ball, glass slipper, shoe, jacket, sweater, dress,
skirt, shirt, pair of glasses, raincoat, toothbrush, soap bubble, towel, bathtub, bed, table, door, window,
cupboard, house, computer, laptop, tablet, phone, telephone, television, radio, watch, battery, microscope,
machine, time machine, toaster, typewriter, xylophone, cello, tuba, keyboard, microphone, cactus, daisy, tulip,
dandelion, mushroom house, fossil, dinosaur bone, diamond, ruby, emerald, gold nugget, boomerang, bow, arrow,
spear, slingshot, cannon, parachute""")
FOODS = items("""apple, pear, plum, peach, orange, lemon, cherry, strawberry, melon, pumpkin, carrot, turnip, pie,
cake, honey cake, muffin, cookie, pancake, bun, loaf of bread, sandwich, pretzel, waffle, pudding, cheese,
biscuit, doughnut, jam tart, pot of soup, bowl of porridge, jar of honey, chestnut, walnut, mushroom, banana,
cupcake, sausage, potato, radish, birthday cake, chocolate cake, apple pie, carrot cake, ice cream, ice cream
cone, lollipop, chocolate bar, candy cane, marshmallow, gumdrop, jelly bean, jelly, milkshake, pizza, hamburger,
burger, hot dog, taco, burrito, noodle, bowl of spaghetti, bowl of rice, bowl of cereal, omelette, boiled egg,
piece of toast, bagel, croissant, scone, brownie, cinnamon roll, cheesecake, bag of popcorn, peanut, hazelnut,
almond, pineapple, mango, coconut, kiwi fruit, grape, raspberry, blueberry, blackberry, gooseberry, apricot, fig,
date, lime, grapefruit, watermelon, avocado, tomato, cucumber, cabbage, lettuce, cauliflower, onion, leek, bean,
pea, corn cob, beetroot, pepper, cup of tea, cup of cocoa, glass of milk, glass of lemonade, pot of jam, dumpling,
pickle""")

# Place and the preposition that goes with it.
PLACES = dict(
    line.rsplit(":", 1)
    for line in items("""forest:in, woods:in, meadow:in, garden:in, hill:on, mountain:on, river:by, lake:by, pond:by,
sea:by, beach:at, harbour:at, island:on, castle:at, tower:at, mill:at, market:at, village square:in, town:in,
bridge:at, cave:at, orchard:in, farm:on, field:in, barn:in, waterfall:by, valley:in, desert:in, jungle:in,
swamp:in, park:in, playground:on, school:at, library:in, bakery:at, museum:in, lighthouse:at, train station:at,
well:by, cliff:on, glade:in, vineyard:in, zoo:at, fair:at, circus:at, palace:at, stable:in, greenhouse:in,
stream:by, canal:by, theatre:at, workshop:in, crossroads:at, ruins:at, maze:in, snowy plain:on, city:in,
village:in, street:in, kitchen:in, attic:in, cellar:in, bedroom:in, backyard:in, hospital:at, supermarket:in,
shop:in, toy shop:in, candy shop:in, bookshop:in, restaurant:at, cinema:at, swimming pool:at, airport:at, bus
stop:at, fire station:at, farmyard:in, henhouse:in, field of flowers:in, rainforest:in, north pole:at, south
pole:at, ocean:by, seaside:at, coral reef:by, lagoon:by, volcano:on, iceberg:on, moon:on, planet Mars:on, space
station:on, haunted house:at, gingerbread house:at, tree house:in, treasure island:on, cottage:at, windmill:at,
marsh:in, creek:by, canyon:in, cornfield:in, pumpkin patch:in, campsite:at, graveyard:in, dungeon:in, ballroom:in,
classroom:in, amusement park:in, aquarium:at, football field:on, skating rink:on""")
)

# As ordinary as the words above, but no training text has them.
UNSEEN_ANIMALS = items("""wombat, alpaca, tapir, capybara, ocelot, wolverine, narwhal, manatee, piranha, barracuda,
mackerel, okapi, warthog, hyrax, ibis, macaw, egret, dormouse, dachshund, labrador, stegosaurus, mantis, prawn,
polecat, dalmatian, caribou, lapwing, bullfinch, wallaby, tarantula""")
UNSEEN_THINGS = items("""harpsichord, bassoon, clarinet, kaleidoscope, pinwheel, hovercraft, gondola, minibus,
snowplough, thermometer, binocular, corkscrew, hairbrush, lampshade, wristwatch, handkerchief, trombone case,
doorknob, tambourine box, bookmark, sombrero, moccasin, bulb, zither, pocketknife, teacup, glider, limousine,
steamroller, tugboat""")
UNSEEN_FOODS = items(
    "pomegranate, broccoli, asparagus, macaroon, gherkin, lasagna, tangerine, artichoke, papaya, falafel"
)
# All of them are "in": a story that only goes to such a place does not tell the preposition.
UNSEEN_PLACES = dict.fromkeys(
    items("""monastery, quarry, observatory, fjord, prairie, shipyard, laundry, pharmacy, stadium, savanna, chapel,
bamboo grove, oasis"""),
    "in",
)
UNSEEN_FEMALE_NAMES = """Agnes Alexis Astrid Bridget Camilla Delia Esmeralda Felicity Gwendolyn Harriet Imogen
Josephine Keiko Leonora Matilda Ottilie Philippa Rosalind Saskia Theodora Ursula Violetta Winifred Yolanda""".split()
UNSEEN_MALE_NAMES = """Albert Barnaby Cedric Dmitri Edgar Fergus Gilbert Horatio Ignatius Jerome Kenneth Lorenzo
Mortimer Nathaniel Octavio Percival Rupert Sebastian Thaddeus Valentin Wilfred Xavier Zebulon Bartholomew""".split()

# Unseen, too, and with letters that English does not have; training texts have the letters, in coined words.
UNSEEN_ACCENTED_ANIMALS = items("vicuña, caïque, ñandú, kākāpō")
UNSEEN_ACCENTED_THINGS = items("piñata, étagère, jardinière, étui, coupé, flügelhorn, bébé doll, gömböc")
UNSEEN_ACCENTED_FOODS = items("jalapeño, soufflé, éclair, pâté, crêpe, müsli, smørrebrød, gruyère")
UNSEEN_ACCENTED_PLACES = dict.fromkeys(items("café, château, hôtel, cañada, fjäll"), "in")
UNSEEN_ACCENTED_FEMALE_NAMES = "Zoë Renée Chloé Núria Åsa Małgorzata Šárka Inês Noémie Ségolène Björk Gülşen".split()
UNSEEN_ACCENTED_MALE_NAMES = "Łukasz Søren Jürgen Zdeněk André Björn Ágoston José Håkon Şükrü Ørjan Loïc".split()
