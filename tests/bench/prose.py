"""English-like prose from word lists: any amount of it, no two pieces that begin alike, the same for the same seed."""

from random import Random


def _split(text: str, separator: str = " ") -> tuple[str, ...]:
    return tuple(text.split(separator))


_FIRST = _split(
    "Ada Agnes Alice Amir Anton Basil Bela Carla Celia Clara Daria Dora Edith Elias Emil Enzo Fatima Felix Flora Greta "
    "Hanna Hugo Ida Igor Ines Ivo Jonas Judith Karim Lena Leo Lydia Magda Marta Milan Mina Nadia Nora Olga Omar"
)
_LAST = _split(
    "Abbott Adler Barker Bell Brandt Carver Castillo Cole Dietrich Dunn Eaton Falk Fisher Fontaine Garner Grant Hale "
    "Harding Hoffmann Ibarra Ivanov Jansen Keller Kovac Lambert Lindqvist Marsh Mercer Novak Okafor Olsen Petrov Quinn "
    "Ramos Reed Santos Silva Tanaka Vogel Weaver"
)
_TRADE = _split(
    "architect baker beekeeper blacksmith bookbinder botanist captain carpenter chemist clerk cook dentist doctor "
    "engineer farmer fisherman gardener geologist glazier historian journalist judge lawyer librarian mason mechanic "
    "miller musician nurse painter pilot plumber potter sailor shepherd surveyor tailor teacher translator weaver"
)
_PLACE = _split(
    "Athens Bergen Bilbao Boston Bremen Cairo Cork Dakar Delhi Dublin Florence Geneva Ghent Glasgow Hamburg Havana "
    "Helsinki Istanbul Kyoto Lagos Lima Lisbon Lyon Madrid Malmo Marseille Montreal Nairobi Naples Oslo Porto Prague "
    "Quito Riga Seoul Seville Sydney Tunis Vienna Warsaw"
)
_ADJECTIVE = _split(
    "ancient bright broken careful cheap clever cold common crowded curious damp distant dusty early empty famous "
    "foreign gentle green heavy hidden honest large late little local lonely narrow noisy northern old ordinary "
    "patient quiet rough rusty secret sharp silver simple slow small solid southern steep strange useful wide wooden"
)
_NOUN = _split(
    "archive barn basket bell boat bridge cabin canal carriage cellar chapel clock coat committee company cottage "
    "court document factory farm ferry field forest fountain garden gate harbour hospital hotel island kitchen ladder "
    "lamp letter library lighthouse machine map market mill mine mountain museum orchard office painting parcel piano "
    "port printer railway report river road roof school ship station storm street theatre tower tunnel valley village "
    "wall warehouse well window workshop"
)
_VERB = _split(
    "admired bought built carried checked cleaned closed counted covered crossed described designed discovered drew "
    "examined explained filled followed found guarded hid inspected left lost measured mentioned moved noticed opened "
    "painted photographed planned praised reached recorded remembered repaired replaced reported sold studied visited "
    "watched"
)
_WHEN = _split(
    "after the war|at dawn|at the end of the week|before breakfast|during the long winter|every second morning|in the "
    "autumn of that year|in the rain|just before midnight|late in the evening|long before sunrise|on a Sunday in "
    "March|on the first day of spring|once a month|shortly after noon|when nobody was looking|while it was snowing",
    "|",
)
_WHY = _split(
    "although the weather was getting worse|and nobody in the town could say why|because the money had run out|but "
    "the others did not believe a word of it|so that the work could go on without them|which surprised everyone who "
    "was there|while the rest of the family waited outside|since there was no other way to get home|even though it "
    "had been forbidden for years|and wrote a long letter about it to a friend",
    "|",
)

_OPENINGS = len(_FIRST) * len(_LAST) * len(_TRADE) * len(_PLACE)
_STRIDE = 1_299_709
"""A prime that divides none of the lists' lengths: serial numbers that follow each other get people far apart."""


def person(serial: int) -> str:
    """Somebody whom no other serial number below two and a half million gets: `Ada Bell, a potter from Lima`."""
    rest = serial * _STRIDE % _OPENINGS
    rest, first = divmod(rest, len(_FIRST))
    rest, last = divmod(rest, len(_LAST))
    trade, place = divmod(rest, len(_PLACE))
    article = "an" if _TRADE[trade][0] in "aeiou" else "a"
    return f"{_FIRST[first]} {_LAST[last]}, {article} {_TRADE[trade]} from {_PLACE[place]}"


def prose(serial: int, num_words: int) -> str:
    """About as many words of prose, which begin with a `person` of that serial number."""
    random = Random(serial)
    sentences = [f"{person(serial)}, {random.choice(_VERB)} {_thing(random)} {random.choice(_WHEN)}."]
    count = len(sentences[0].split())
    while count < num_words:
        sentences.append(_sentence(random))
        count += len(sentences[-1].split())
    return " ".join(sentences)


def question(serial: int) -> str:
    """A short question that `person` asks."""
    random = Random(serial)
    return f"{person(serial)}, has {_thing(random)} and {_thing(random)}. {random.choice(_QUESTIONS)}"


_QUESTIONS = (
    "What would you do with them, and why?",
    "Tell a short story about that.",
    "How could they be of use to each other?",
    "Describe them to somebody who cannot see them.",
    "Which of the two is worth more? Give three reasons.",
)


def _thing(random: Random) -> str:
    return f"the {random.choice(_ADJECTIVE)} {random.choice(_NOUN)}"


def _sentence(random: Random) -> str:
    def they() -> str:
        return f"the {random.choice(_TRADE)}"

    match random.randrange(5):
        case 0:
            text = f"{they()} {random.choice(_VERB)} {_thing(random)} {random.choice(_WHEN)}, {random.choice(_WHY)}"
        case 1:
            text = f"{random.choice(_WHEN)}, {they()} {random.choice(_VERB)} {_thing(random)}, {random.choice(_WHY)}"
        case 2:
            text = f"{_thing(random)} stood beside {_thing(random)}, {random.choice(_WHY)}"
        case 3:
            text = f"{they()} and {they()} {random.choice(_VERB)} {_thing(random)} in {random.choice(_PLACE)}"
        case _:
            text = f"{they()} {random.choice(_VERB)} {_thing(random)}, and {they()} {random.choice(_VERB)} it too"
    return f"{text[0].upper()}{text[1:]}."
