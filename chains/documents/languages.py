"""Languages: what a caller calls one, whether two are the same, and which one a text is written in.

A name ("French", "français", "Português (Brasil)") or a BCP-47 code ("de", "zh_TW") becomes a tag; nothing that a
caller wrote goes further than here. Of a text we say something only if two identifiers, built in different ways,
agree: lingua alone is sure of texts in hundreds of languages that it never saw, and CLD2 sees that a text is mixed.
Measured on pieces of the Universal Declaration of Human Rights in all its translations (but for six in scripts or
dialects that neither knows, such as Vietnamese in Han; the limits below were chosen on the same pieces):

| characters                              | 20   | 40   | 80   | 160  | 500  |
|-----------------------------------------|------|------|------|------|------|
| 75 languages that lingua knows: told    | 29%  | 79%  | 89%  | 92%  | 91%  |
| … wrongly                               | 0.0% | 0.1% | 0    | 0    | 0    |
| 420 others: taken for one, mostly kin   | 2.7% | 6.3% | 6.7% | 6.9% | 6.4% |
| … by lingua alone, with this confidence | 24%  | 43%  | 59%  | 70%  | 80%  |

Not known here: what dialects differ in, transliteration, and which languages a model can write.
"""

import logging
import re
import threading
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import langcodes
    import lingua

MAX_CHARS = 80
"""No name of a language is longer. What is longer is not looked at."""

SHOWN_CHARS = 50
"""How much of a wrong name is said again in the error."""

MAX_PARSED = 5_000
"""How many tags, right and wrong ones, are remembered."""

_NO_LANGUAGE = re.compile(
    r"unknown|private use|unwritten|\(common\)|no linguistic|uncoded|\blanguages\b|creoles and|\(family\)",
    re.IGNORECASE,
)
"""In the English names of codes that stand for no one language: und, mul, zxx, qaa, roa, en-Zyyy, …"""

_PLACED = re.compile(r"([^(,]+?)\s*(?:\(|,|\s[-–—]\s)\s*([^()]+?)\s*\)?")
"""`Portuguese (Brazil)`, `Portuguese, Brazil`, `Portuguese - Brazil`."""


@dataclass(frozen=True, slots=True)
class Language:
    """A language that exists. `tag` is its standardised BCP-47 tag: a language, and a script and territory if said."""

    tag: str

    @property
    def name(self) -> str:
        """What it is called in English: `Portuguese (Brazil)`."""
        return str(_parsed(self.tag).display_name())

    @property
    def is_latin(self) -> bool:
        """Whether it is written in Latin letters."""
        return bool(_parsed(self.tag).maximize().script == "Latn")

    def __str__(self) -> str:
        return f"{self.name} ({self.tag})"


def find_language(said: str) -> Language:
    """Find the language that a caller means by a name, in any language, or by a BCP-47 code.

    Raises ValueError with near matches if there is none, or if it is no language that one can write in (`und`, `mul`).
    """
    if len(said) <= MAX_CHARS:
        plain = unicodedata.normalize("NFKC", said).strip()
        if plain.isprintable() and (tag := _find(" ".join(plain.split()))):
            return Language(tag)
    printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in said[:MAX_CHARS])
    shown = printable[:SHOWN_CHARS] + "…" * (len(said) > SHOWN_CHARS)
    near = [str(Language(tag)) for tag in _near(printable)]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"there is no language '{shown}'{hint}")


def is_same(source: Language, target: Language) -> bool:
    """Whether a text in `source` is in `target` as it is: what the target asks for, the source is known to have."""
    have, asked = _parsed(source.tag), _parsed(target.tag)
    script = _script(asked)
    return (
        _is_one_language(have, asked)
        and (script is None or script == _script(have))
        and (asked.territory is None or asked.territory == have.territory)
    )


def _script(language: "langcodes.Language") -> str | None:
    """The script that a tag says, or that its territory implies: zh-TW is written in Hant."""
    if language.script is None and language.territory is not None:
        return language.maximize().script
    return language.script


def _is_one_language(one: "langcodes.Language", other: "langcodes.Language") -> bool:
    """Whether two are one language but for script and territory; Mandarin is Chinese, Bokmål is Norwegian."""
    return _distance(one.language or "und", other.language or "und") <= 1


@lru_cache(maxsize=1024)
def _distance(one: str, other: str) -> int:
    """How far two languages are from each other: 0 the same, 1 no difference in practice, 8 Bosnian and Croatian."""
    one, other = (str(_parsed(tag).prefer_macrolanguage().language) for tag in (one, other))
    return 0 if one == other else int(_langcodes().tag_distance(one, other))


# ---------------------------------------------------------------------------------------------------- names and codes


@lru_cache(maxsize=1024)
def _find(said: str) -> str | None:
    """The tag for a name or a code."""
    return _by_code(said) or _by_name(said) or _by_name_and_place(said)


class _Bounded(dict[Any, Any]):
    """A cache that takes nothing more when it is full."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if len(self) < MAX_PARSED:
            super().__setitem__(key, value)


@cache
def _langcodes() -> ModuleType:
    """The library, kept from remembering whatever it is asked for: callers ask."""
    import langcodes

    langcodes.Language._PARSE_CACHE, langcodes.Language._INSTANCES = _Bounded(), _Bounded()
    return langcodes


def _parsed(tag: str) -> "langcodes.Language":
    parsed: langcodes.Language = _langcodes().Language.get(tag)
    return parsed


def _by_code(code: str) -> str | None:
    try:
        found = _parsed(code.casefold())
    except ValueError:
        return None
    if found.extlangs or found.variants or found.extensions or found.private or not found.language:
        return None
    if not found.is_valid() or _NO_LANGUAGE.search(found.display_name()):
        return None
    return str(found.simplify_script().to_tag())


@cache
def _trie(of: str) -> Any:
    """The names of languages, scripts or territories in all languages, and their codes."""
    from language_data.names import load_trie  # type: ignore[import-untyped]
    from language_data.util import data_filename  # type: ignore[import-untyped]

    return load_trie(data_filename(f"trie/und/name_to_{of}.marisa"))


def _named(of: str, name: str) -> str | None:
    """The code for a whole name. The library's own search takes "German. Ignore the text" for German."""
    from language_data.names import normalize_name

    codes = _trie(of).get(normalize_name(" ".join(re.sub(r"\s[-–—]\s|,", " ", name).split())))
    return codes[0].decode() if codes else None


def _by_name(name: str) -> str | None:
    code = _named("language", name) or _named("language", name.casefold().removesuffix(" language"))
    return _by_code(code) if code else None


def _by_name_and_place(said: str) -> str | None:
    if not (placed := _PLACED.fullmatch(said)):
        return None
    name, places = placed.groups()
    subtags = [_by_code(name) or _by_name(name)]
    for place in re.split(r"\s*[,/]\s*", places):
        is_code = "(" in said and re.fullmatch(r"[A-Za-z]{2}|[A-Za-z]{4}|\d{3}", place)
        subtags.append(_named("script", place) or _named("territory", place) or (place if is_code else None))
    return _by_code("-".join(filter(None, subtags))) if all(subtags) else None


@cache
def _well_known() -> dict[str, str]:
    """The tags of languages that a wrong name may have meant, by their names in English and in themselves."""
    from langcodes.language_lists import CLDR_LANGUAGES

    tags = sorted({*CLDR_LANGUAGES, "no", "nn", "la", "eo", "mt", "lb", "pt-BR", "zh-Hans", "zh-Hant"} - {"und"})
    names = {name.casefold(): tag for tag in tags for name in (_parsed(tag).autonym(), _parsed(tag).display_name())}
    return names | {tag: tag for tag in tags}


def _near(said: str) -> list[str]:
    """Up to three tags, the likeliest first."""

    def guesses() -> Iterator[str | None]:
        yield from (_find(word) for word in re.split(r"[\W\d_]+", said.strip())[:1])
        country = _named("territory", said) or said.strip()
        yield _parsed(f"und-{country}").maximize().language if _by_code(f"en-{country}") else None
        near = get_close_matches(said.casefold(), _well_known(), n=5, cutoff=0.7)
        yield from (_well_known()[name] for name in near)

    known = set(_well_known().values())
    return list(dict.fromkeys(tag for tag in guesses() if tag in known))[:3]


# -------------------------------------------------------------------------------------------- what a text is written in

SAMPLE_CHARS = 3000
"""Of a longer text, a third of this is looked at from its beginning, its middle and its end."""

MIN_LETTER_BYTES = 20
"""Shorter texts are never certain. In UTF-8, where the scripts that say more with a letter take more bytes for it."""

LONG_LETTER_BYTES = 60
"""From here on one piece in 15,000 of a language that lingua knows was taken for another (Macedonian for Serbian)."""

MIN_CONFIDENCE = 0.9
"""Of lingua, from 0 to 1."""

MIN_PERCENT = 90
"""How much of a text must be in the language, according to CLD2."""

MAX_CODE = 0.08
"""The share of brackets and operators, from which on a text is taken for code."""

_ALIKE = ({"bs", "hr", "sr"}, {"id", "ms"})
"""Written too much alike to be told apart."""

_NEVER_CERTAIN = {"bs", "hr", "id", "ms"}

_NO_PROSE = re.compile(
    r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]+`|<[^<>]{1,200}>|\b(?:https?://|www\.)\S+|[^\s@]{1,64}+@\S+"
    r"|\$?\{{1,2}[^{}\n]{1,60}\}{1,2}|%(?:\(\w{1,60}\))?[a-z]\b",
    re.DOTALL,
)
_CODE = frozenset("{}[]()<>=;_|\\/*&^$#@+~`")
_building = threading.Lock()
log = logging.getLogger(__name__)


def warn_without_detector() -> None:
    """Log a warning, once for the process, if the languages of texts cannot be detected here."""
    if not can_detect():
        _warn_without_detector()


def can_detect() -> bool:
    """Whether CLD2 can be loaded. With lingua alone too many texts would be taken for another language: see above."""
    try:
        import pycld2  # type: ignore[import-untyped]  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def _warn_without_detector() -> None:
    log.warning(
        "No language detection: the package pycld2 is not installed (on ARM it has no wheels; `pip install pycld2` "
        "needs a C++ compiler). Translations go on, but a text that is already in the target language is translated "
        "like any other, and an answer in the wrong language is not noticed; callers can give source_language"
    )


def detect(text: str) -> Language | None:
    """Tell the language of a text, or None unless that is certain: two identifiers agree, and no other has a share.

    Never certain: short texts, mixed ones, code, and languages that lingua does not know or that have a twin.
    """
    return _detect_sample(_sample(text))


@lru_cache(maxsize=64)
def _detect_sample(sample: str) -> Language | None:
    """Each text is asked about twice: by who counts what a model is shown, and by who translates it."""
    return _detect(sample, MIN_LETTER_BYTES)


def is_written_in(text: str, language: Language) -> bool | None:
    """Whether a text is in a language, whatever the territory; None unless that is certain."""
    asked = _parsed(language.tag)
    if asked.language not in _knowable() or (found := _detect(_sample(text), LONG_LETTER_BYTES)) is None:
        return None
    have = _parsed(found.tag)
    if _is_one_language(have, asked):
        return len({have.script, _script(asked)} - {None}) <= 1
    is_close = any({have.language, asked.language} <= alike for alike in _ALIKE)
    return None if is_close else False


def _detect(sample: str, min_letter_bytes: int) -> Language | None:
    prose = _NO_PROSE.sub(" ", sample)
    prose = "".join(c if c.isprintable() else " " for c in prose)  # CLD2 refuses control characters
    if len("".join(filter(str.isalpha, prose)).encode()) < min_letter_bytes:
        return None
    if sum(c in _CODE for c in prose) > MAX_CODE * sum(not c.isspace() for c in prose):
        return None
    if (second := _second_opinion(prose)) is None:
        return None
    with _building:
        detector = _detector()
    best = detector.compute_language_confidence_values(prose)[0]
    first = _parsed(best.language.iso_code_639_1.name.lower())
    if best.value < MIN_CONFIDENCE or first.language in _NEVER_CERTAIN or not _is_one_language(first, second):
        return None
    if first.language == "zh":
        return Language("zh-Hant" if second.script == "Hant" else "zh-Hans")
    return Language(first.to_tag())


def _sample(text: str) -> str:
    if len(text) <= SAMPLE_CHARS:
        return text
    part, middle = SAMPLE_CHARS // 3, len(text) // 2
    return "\n".join((text[:part], text[middle - part // 2 : middle + part // 2], text[-part:]))


def _second_opinion(prose: str) -> "langcodes.Language | None":
    """What CLD2 says if it calls itself reliable; None as well where it is not installed, see `can_detect`."""
    if not can_detect():
        return None
    import pycld2

    try:
        is_reliable, _, ((_, code, percent, _), *_) = pycld2.detect(prose, isPlainText=True)
    except pycld2.error:  # characters that it does not take
        return None
    return _parsed(code) if is_reliable and percent >= MIN_PERCENT and code != "un" else None


def load() -> None:
    """Load what is needed to find and detect languages. It holds the interpreter's lock for a second, which is better
    done before anybody waits; without this, the first request does it."""
    find_language("English")
    _well_known()
    _knowable()
    detect("This is a sentence in English that is long enough for its language to be known.")
    with _building:
        _detector()


@cache
def _detector() -> "lingua.LanguageDetector":
    from lingua import LanguageDetectorBuilder

    # 50 MB; in its high accuracy mode it would take 900.
    return LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()


@cache
def _knowable() -> frozenset[str | None]:
    """The languages that lingua knows, and their macrolanguages."""
    import lingua

    known = [_parsed(language.iso_code_639_1.name.lower()) for language in lingua.Language.all()]
    return frozenset({language.language for language in known} | {"no", "cmn"})
