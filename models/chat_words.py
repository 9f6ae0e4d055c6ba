"""Words, names and numbers that the conversations of ``tiny-chat`` are made of.

Most of them are invented from syllables: a model that has seen a million invented words copies from its context instead
of recalling a vocabulary, which is what the held-out names and phrases ask for.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from models import chat_split


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ONSETS = _listed(
    "b c d f g h j k l m n p qu r s t v w x y z bl br ch cl cr dr fl fr gl gr kn ph pl pr sc sh sk sl sm sn sp st sw "
    "th tr tw wh"
)
VOWELS = _listed("a a a e e e i i o o u y ai au ea ee ei ia ie io oa oo ou ue")
CODAS = ("",) * 4 + _listed("b ck d g l ld ll m n n nd ng nt p r r rd rk rn s s ss st t t th x z")

NAMES = _listed("""
Ada Adam Agnes Ahmed Aiko Alan Alba Alex Alice Alma Amara Amir Ana Andre Anna Anton Aria Arjun Astrid Ava Bao Bea Ben
Bianca Bjorn Bob Boris Bruno Carla Carlos Carmen Chen Chloe Clara Cora Cyrus Dana Daniel Daria David Dora Dylan Edgar
Eero Elena Elif Elsa Emil Emma Enzo Erik Esra Eva Fatima Felix Fiona Flora Frank Freya Gita Grace Greta Gus Hana Hans
Hugo Ian Ida Igor Ines Ingrid Iris Isla Ivan Jack Jane Jin Joan John Jonas Jose Julia Kaito Karl Kate Kenji Kira Kofi
Lara Lars Laura Lea Lena Leo Liam Lily Linus Lola Luca Lucy Luis Maja Marco Maria Mark Marta Mateo Maya Mia Mila Milo
Mira Mohammed Nadia Naomi Nico Nina Noah Nora Olaf Olga Oliver Omar Oscar Otto Pablo Paul Pavel Pia Priya Quinn Rafael
Raj Rania Rosa Ruth Sam Sana Sara Sasha Selma Simon Sofia Sven Tara Theo Tim Tomas Uma Vera Victor Walter Wei Wendy
Xenia Yan Yara Yuki Yusuf Zane Zara Zoe Zoltan Jürgen Zoë René Łukasz Søren Núria José Anaïs Çelik Đorđe
""")

WORDS = _listed("""
able above across actor after again air all almost along also always among anchor angle animal answer apple April arm
army around art ask aunt autumn away baby back bad bag baker ball banana bank basket beach bean bear beautiful bed bee
bell below best better big bike bird black blue board boat body bone book boot both bottle bottom box boy brave bread
break bridge bright bring broken brother brown brush build burn bus busy butter button buy cake call camera camp candle
car card care carrot carry cat catch chair change cheap cheese chess child choose church circle city class clean clear
clever clock close cloth cloud coat coffee coin cold color come cook copper corner cotton country course cow cream cross
cry cup cut dance dark daughter day deep deer desk dinner dirty doctor dog door dragon draw dream dress drink drive dry
duck dust each ear early earth east easy eat edge egg eight empty end engine enough evening every eye face fall family
far farm fast father feather feel fence few field fight fill find fine finger fire first fish five floor flower fly fog
follow food foot forest forget fork fox free fresh friend frog fruit full funny garden gate gentle gift girl give glad
glass go goat gold good grass gray great green ground grow guitar hair half hall hammer hand happy hard harvest hat hear
heart heavy help hen high hill hold home honey hope horse hot hour house hungry ice idea inside iron island jacket jam
job join joke juice jump keep key kind king kitchen kite knee knife ladder lake lamp large last late laugh leaf learn
left leg lemon letter light lion lip listen little long loud love low lucky lunch machine make man many map market meat
meet melon metal milk mirror moment money monkey month moon morning mother motor mountain mouse mouth move music narrow
near neck needle nest never new next night nine noise north nose note number ocean often oil old onion open orange other
outside oven paint palace paper park party path pen pencil people pepper piano picture pig pink plane planet plant plate
play pocket poem poet pond poor potato pretty prince pull purple push queen quick quiet rabbit rain read ready red rest
rice rich ride right ring river road rock roof room rope rose round run sad salt sand school sea second seed seven
shadow sharp sheep ship shirt shoe shop short shoulder silver sing sister six sky sleep slow small smile smoke snake
snow soap soft song soup south space spoon spring square star station stone storm story street strong sugar summer sun
sweet swim table tail tall tea teacher ten thick thin thing three thunder ticket tiger time tiny tomato tooth top tower
town toy train travel tree true turn two ugly umbrella uncle under valley village violin visit voice wait walk wall warm
wash watch water wave weather week well west wet wheel white wide wild wind window wine winter wise wolf woman wood wool
word work world write yard year yellow yes young zebra
""")

ROLES = _listed("""
archer artist astronaut baker barber beekeeper bishop blacksmith botanist builder butcher carpenter cartographer chef
chemist clerk clown coach cook cowboy dancer dentist detective diver doctor driver dragon editor engineer explorer
farmer fisher gardener geologist ghost guard guide historian hunter innkeeper inventor janitor jeweller judge juggler
keeper king knight lawyer librarian lighthouse magician maid mechanic merchant miller miner monk musician nurse painter
pilot pirate plumber poet postman potter priest prince professor queen ranger robot sailor scholar scientist sculptor
shepherd shopkeeper singer smith soldier spy tailor teacher thief tutor vet waiter weaver wizard writer
""")

SCRIPT_RANGES = (
    (0x00DF, 0x00F6),  # Latin-1
    (0x0101, 0x017F),  # Latin Extended-A
    (0x03B1, 0x03C9),  # Greek
    (0x0430, 0x044F),  # Cyrillic
    (0x05D0, 0x05EA),  # Hebrew
    (0x0905, 0x0939),  # Devanagari
    (0x3042, 0x3093),  # Hiragana
    (0x4E00, 0x9FA5),  # Han
    (0xAC00, 0xD7A3),  # Hangul
)
EMOJI_RANGES = ((0x1F300, 0x1F64F), (0x1F680, 0x1F6C5), (0x2600, 0x26FF), (0x1F900, 0x1F9FF))
PUNCTUATION = ".,;!?-()'\"/:*&%#@+=_<>[]~$"


def _syllables(rng: random.Random, count: int) -> str:
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(count))


def invented_word(rng: random.Random) -> str:
    """A pronounceable word of one to three syllables."""
    word = _syllables(rng, rng.choice((1, 1, 2, 2, 2, 3)))
    return rng.choice(VOWELS)[0] + word if rng.random() < 0.2 else word


def _letters(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(1, 8)))


def _foreign(rng: random.Random) -> str:
    low, high = rng.choice(SCRIPT_RANGES)
    return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 5)))


def _accented(rng: random.Random) -> str:
    letters = list(invented_word(rng))
    letters[rng.randrange(len(letters))] = rng.choice("äöüßéèêáàâíîóôúûñçåøæłžšč")
    return "".join(letters)


def _emoji(rng: random.Random) -> str:
    return "".join(chr(rng.randint(*rng.choice(EMOJI_RANGES))) for _ in range(rng.choice((1, 1, 2))))


def _draw(make: Callable[[], str], refused: Callable[[str], bool]) -> str:
    while True:
        item = make()
        if not refused(item):
            return item


def word(rng: random.Random, held_out: bool) -> str:
    """A lower-case word of the asked side of the split, half of the time a dictionary word."""
    return _draw(
        lambda: rng.choice(WORDS) if rng.random() < 0.4 else invented_word(rng),
        lambda item: chat_split.word_is_held_out(item) != held_out,
    )


def token(rng: random.Random, held_out: bool) -> str:
    """Anything between two spaces of a phrase: a word, a number, another script, an emoji."""
    roll = rng.random()
    if roll < 0.62:
        text = word(rng, held_out)
    elif roll < 0.72:
        text = _draw(lambda: _letters(rng), lambda item: chat_split.word_is_held_out(item) != held_out)
    elif roll < 0.84:
        text = str(rng.randint(0, 10 ** rng.randint(1, 5)))
    elif roll < 0.89:
        text = _foreign(rng)
    elif roll < 0.94:
        text = _draw(lambda: _accented(rng), lambda item: chat_split.word_is_held_out(item) != held_out)
    else:
        text = _emoji(rng)
    return cased(rng, text)


def cased(rng: random.Random, text: str) -> str:
    """Most of the time ``text`` itself, at times capitalised or in capitals."""
    roll = rng.random()
    if roll < 0.75:
        return text
    return text[:1].upper() + text[1:] if roll < 0.92 else text.upper()


def phrase(rng: random.Random, held_out: bool, longest: int = 12) -> str:
    """One to ``longest`` tokens with some punctuation, without space at the ends."""
    parts = [token(rng, held_out) for _ in range(rng.randint(1, longest))]
    for index in range(len(parts) - 1):
        if rng.random() < 0.06:
            parts[index] += rng.choice(PUNCTUATION)
    if rng.random() < 0.45:
        parts[-1] += rng.choice("...!?") if rng.random() < 0.8 else rng.choice(PUNCTUATION)
    return " ".join(parts)


def _name(rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.35:
        return rng.choice(NAMES)
    if roll < 0.93:
        return _syllables(rng, rng.choice((1, 2, 2, 3))).capitalize() + rng.choice(("", "", "a", "o", "in", "el", "y"))
    return _accented(rng).capitalize()


def name(rng: random.Random, held_out: bool) -> str:
    """A capitalised name of the asked side of the split."""
    return _draw(lambda: _name(rng), lambda item: chat_split.name_is_held_out(item) != held_out)


def full_name(rng: random.Random, held_out: bool) -> str:
    """A name, at times with a family name."""
    first = name(rng, held_out)
    return f"{first} {name(rng, held_out)}" if rng.random() < 0.15 else first


def role(rng: random.Random, held_out: bool) -> str:
    """What a persona is, with its article: ``a lighthouse keeper``."""
    noun = rng.choice(ROLES) if rng.random() < 0.7 else word(rng, held_out)
    roll = rng.random()
    if roll < 0.45:
        noun = f"{rng.choice(ROLES) if rng.random() < 0.3 else word(rng, held_out)} {noun}"
    article = "the" if roll > 0.9 else ("an" if noun[0] in "aeiou" else "a")
    tail = f" from {name(rng, held_out)}" if rng.random() < 0.12 else ""
    return f"{article} {noun}{tail}"
