"""The demo task: sentences about films and food from a seeded grammar, so that a first run needs no download.

The words of a sentence do not reveal its label: positive and negative words are equally frequent under both labels. What
matters is how they are combined (negation, contrast, comparison, degree). The dev set has templates, subjects and openings
that the training set does not have.
"""

import random

from funnel.data.files import InMemoryExamples

POSITIVE = (
    "good great lovely charming clever fresh funny delightful wonderful brilliant rich warm elegant gripping tender "
    "excellent superb tasty crisp memorable moving bright satisfying splendid"
).split()
NEGATIVE = (
    "bad dull bland stale clumsy tedious boring awful flat dreary greasy cold shallow messy tiresome terrible sour "
    "soggy forgettable lifeless grim heavy disappointing dismal"
).split()

# Subjects and openings: (training set, dev set).
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

# A quarter of the training sentences have made-up names as subjects, so that a model learns to ignore unknown words: the
# dev set's subjects are unknown to it.
SYLLABLES = "zo,ral,mi,ken,ta,vor,lu,pan,dri,so,bek,ne,ga,fil,ro,ster".split(",")

# Words that do not change the sentiment, sampled independently for each slot.
ARTICLES = ("the", "this", "their")
DEGREES = ("", "", "", "really ", "very ", "so ", "quite ")

# {s}, {t}: subjects. {a}: the word that decides the label. {o}: a word of the opposite sentiment. The number is 1 if the
# sentence has the sentiment of {a}, -1 if it has the opposite one.
N_PLAIN = 3  # the first training templates are plain statements
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
    """Generates the training and the dev set. Label 1 is positive, 0 negative; each set is balanced.

    Args:
        train, dev: number of sentences.
        seed: of the grammar; independent of the training run's seed, so that all runs see the same task.
    """
    rng = random.Random(seed)
    train_set = _generate(train, rng, is_dev=False)
    return train_set, _generate(dev, rng, is_dev=True)


def _generate(count: int, rng: random.Random, is_dev: bool) -> InMemoryExamples:
    """Generates distinct sentences, alternating between the labels."""
    texts: dict[str, str] = {}  # label by text
    while len(texts) < count:
        label = len(texts) % 2
        text = _sentence(label, rng, is_dev)
        texts.setdefault(text, str(label))
    return InMemoryExamples(list(texts), None, list(texts.values()))


def _sentence(label: int, rng: random.Random, is_dev: bool) -> str:
    # Half of the training set are plain statements: they teach what the words mean, the others how they combine.
    is_plain = not is_dev and rng.random() < 1 / 2
    template, sign = rng.choice(TEMPLATES[is_dev][:N_PLAIN] if is_plain else TEMPLATES[is_dev])
    deciding, opposite = (POSITIVE, NEGATIVE) if (label == 1) == (sign == 1) else (NEGATIVE, POSITIVE)
    first, second = rng.sample(SUBJECTS[is_dev], 2)
    if not is_dev and rng.random() < 1 / 4:
        first, second = ("".join(rng.sample(SYLLABLES, rng.randint(2, 3))) for _ in range(2))
    sentence = template.format(
        s=f"{rng.choice(ARTICLES)} {first}",
        t=f"{rng.choice(ARTICLES)} {second}",
        a=rng.choice(DEGREES) + rng.choice(deciding),
        o=rng.choice(DEGREES) + rng.choice(opposite),
    )
    return f"{rng.choice(OPENINGS[is_dev])}{sentence} ."
