"""The demo task: sentences about films and food, made by a seeded grammar, so that a first run needs no download.

The words of a sentence do not tell its label: praise and blame occur equally often under both, and what counts is how
they are joined (negation, contrast, comparison, degree). The dev set has templates, subjects and openings that the
training set does not have.
"""

import random

from funnel.data.dataset import InMemoryExamples

PRAISE = (
    "good great lovely charming clever fresh funny delightful wonderful brilliant rich warm elegant gripping tender "
    "excellent superb tasty crisp memorable moving bright satisfying splendid"
).split()
BLAME = (
    "bad dull bland stale clumsy tedious boring awful flat dreary greasy cold shallow messy tiresome terrible sour "
    "soggy forgettable lifeless grim heavy disappointing dismal"
).split()

# Subjects and openings: (in training, held out for dev).
SUBJECTS = (
    (
        "film,movie,plot,script,ending,cast,soundtrack,sequel,comedy,thriller,dialogue,first act,lead actor,camera work,"
        "story,costume,trailer,director,love scene,car chase,twist,hero,sound,lighting,stage set,last hour,prequel,actress,"
        "soup,pasta,dessert,pizza,curry,salad,steak,sauce,bread,menu,breakfast,chef's special,service,coffee,"
        "tea,cake,sandwich,noodle dish,rice,chicken,buffet,starter,drink,wine list,snack,waiter,pie,table by the window"
    ).split(","),
    (
        "drama,western,finale,screenplay,villain,animation,musical,opening scene,documentary,narrator,"
        "risotto,burger,pudding,omelette,dumpling,stew,fish,cheesecake,lunch,side dish,broth,juice"
    ).split(","),
)
OPENINGS = (
    ["", "", "", "honestly , ", "i think ", "we agreed that ", "for the price , ", "last night "],
    ["", "", "in short , ", "my friends said ", "on sunday ", "it seems to me that "],
)

# A quarter of the training set's subjects are invented names, so that a model learns to pass over words that it does not
# know; those of dev are other nouns.
SYLLABLES = "zo,ral,mi,ken,ta,vor,lu,pan,dri,so,bek,ne,ga,fil,ro,ster".split(",")

# Words that leave a sentence's sign as it is, drawn anew for each place.
ARTICLES = ("the", "this", "their")
DEGREES = ("", "", "", "really ", "very ", "so ", "quite ")

# {s}, {t}: subjects. {a}: the word that decides; {o}: one of the opposite kind. The second entry says whether the
# sentence has the sign of {a} (+1) or the opposite (-1).
PLAIN = 3  # so many of the training templates are plain statements
TEMPLATES = (
    [
        ("{s} was {a}", 1),
        ("{s} is {a}", 1),
        ("such {a} things as {s}", 1),
        ("{s} was not {a}", -1),
        ("{s} is not {a} at all", -1),
        ("{s} was never {a}", -1),
        ("there was nothing {a} about {s}", -1),
        ("{s} was far from {a}", -1),
        ("far from {o} , {s} was {a}", 1),
        ("{s} was anything but {a}", -1),
        ("{s} was hardly {a}", -1),
        ("nobody would call {s} {a}", -1),
        ("{s} was neither {a} nor worth the wait", -1),
        ("i had hoped for {a} things from {s} , but no", -1),
        ("{s} was {o} at first but {a} in the end", 1),
        ("at first {s} was {o} , in the end it was {a}", 1),
        ("{s} was {o} , but {t} was {a}", 1),
        ("{t} was not {a} , but {s} was", 1),
        ("{s} was not {o} but {a}", 1),
        ("{s} was {a} , not {o}", 1),
        ("{s} was {a} , although {t} was {o}", 1),
        ("although {t} was {o} , {s} was {a}", 1),
        ("although {s} was not {o} , {t} was not {a}", -1),
        ("{s} was {a} , despite {t} being {o}", 1),
        ("despite {t} being {o} , {s} was {a}", 1),
        ("{s} was not as {a} as {t}", -1),
        ("{s} was not as {a} as people say", -1),
        ("{s} was a little {o} , yet extremely {a}", 1),
        ("{s} was extremely {a} , if a little {o}", 1),
        ("i expected {s} to be {o} and it was {a}", 1),
        ("is {s} {o} ? no , it is {a}", 1),
        ("is {s} {a} ? no", -1),
        ("{s} and {t} were {a}", 1),
        ("{s} and {t} were not {a}", -1),
        ("nobody would call {s} {o} , because it was {a}", 1),
        ("{s} was hardly {o} , it was {a}", 1),
        ("{s} was anything but {o} and rather {a}", 1),
        ("{s} was not {a} , although {t} was", -1),
        ("{s} was never {o} , it was {a}", 1),
        ("although {s} was {o} , in the end it was {a}", 1),
        ("there was something {o} about {s} , yet it was {a}", 1),
        ("although {s} was {a} at first , in the end it was not", -1),
    ],
    [
        ("{s} was not really {a} at all", -1),
        ("{s} was {o} , but in the end it was {a}", 1),
        ("although {s} was {o} at first , it was extremely {a}", 1),
        ("{s} was never {o} , but {a}", 1),
        ("despite being a little {o} , {s} was extremely {a}", 1),
        ("{s} was not as {a} as i expected", -1),
        ("nobody would call {s} and {t} {a}", -1),
        ("i expected {s} to be {o} but it was {a}", 1),
        ("{t} was {o} , yet {s} was {a}", 1),
        ("{s} was anything but {o} , it was {a}", 1),
        ("there was nothing {o} about {s} , it was {a}", 1),
        ("{s} is hardly {a} , although {t} is {a}", -1),
        ("{s} and {t} were far from {a}", -1),
        ("{s} is {a} , not {o} at all", 1),
    ],
)


def examples(train: int = 24000, dev: int = 600, seed: int = 0) -> tuple[InMemoryExamples, InMemoryExamples]:
    """Makes the training and the dev set: label 1 for praise, 0 for blame, as many of each.

    Args:
        train, dev: how many sentences.
        seed: of the grammar's dice; not the training run's, so that all runs see the same task.
    """
    dice = random.Random(seed)
    train_set, dev_set = (_sentences(held_out, count, dice) for held_out, count in ((0, train), (1, dev)))
    return train_set, dev_set


def _sentences(held_out: int, count: int, dice: random.Random) -> InMemoryExamples:
    texts: list[str] = []
    labels: list[str] = []
    seen = set()
    while len(texts) < count:
        # Plain statements are half of the training set: they teach what the words mean, the others how they combine.
        plain = held_out == 0 and dice.random() < 1 / 2
        template, sign = dice.choice(TEMPLATES[held_out][:PLAIN] if plain else TEMPLATES[held_out])
        label = len(texts) % 2
        deciding, other = (PRAISE, BLAME) if (label == 1) == (sign == 1) else (BLAME, PRAISE)
        first, second = dice.sample(SUBJECTS[held_out], 2)
        if held_out == 0 and dice.random() < 1 / 4:
            first, second = ("".join(dice.sample(SYLLABLES, dice.randint(2, 3))) for _ in range(2))
        sentence = template.format(
            s=f"{dice.choice(ARTICLES)} {first}",
            t=f"{dice.choice(ARTICLES)} {second}",
            a=dice.choice(DEGREES) + dice.choice(deciding),
            o=dice.choice(DEGREES) + dice.choice(other),
        )
        text = f"{dice.choice(OPENINGS[held_out])}{sentence} ."
        if text not in seen:
            seen.add(text)
            texts.append(text)
            labels.append(str(label))
    return InMemoryExamples(texts, None, labels)
