"""American spelling in prose and identifiers, as in PyTorch: one spelling per word in the whole repository."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ISE = (
    "parameteris specialis generalis normalis standardis initialis optimis regularis quantis binaris vectoris "
    "minimis maximis summaris visualis organis recognis categoris customis discretis equalis factoris finalis linearis "
    "localis memoris penalis polaris prioritis randomis rasteris realis serialis deserialis stabilis synchronis "
    "synthesis tokenis utilis materialis symbolis capitalis apologis emphasis formalis idealis neutralis"
)
"""Stems of verbs in -ize; "synthesis" and "emphasis" are correct nouns."""

BRITISH = re.compile(
    r"re-parameteri\w*"
    + "".join(rf"|{stem}(?:e|ed|es|er|ers|ing|able|ation|ations)(?![a-z])" for stem in ISE.split())
    + r"|(?:analys|catalys|paralys)(?:e|ed|er|ing)(?![a-z])"
    r"|centre|centring|colour|grey(?!hound)|behaviour|favour|neighbour|honour|labour|flavour|rigour|vigour"
    r"|labell(?:ed|ing)|cancell(?:ed|ing)|modell(?:ed|ing|er)|travell(?:ed|ing)|channell(?:ed|ing)|signall(?:ed|ing)"
    r"|fuell|fulfil(?!l)|learnt|spelt|burnt|whilst|amongst|artefact|catalogue|dialogue|analogue|defence|offence"
    r"|licence|practis|judgement|acknowledgement|programme(?!d|r)|sceptic|mould|tyre|metre(?!s? per)|millimetre|fibre"
    r"|calibre|kerb|storey|ageing|cheque|per cent\b",
    re.IGNORECASE,
)
FILES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    + [path for room in ("src", "docs", "examples") for path in (ROOT / room).rglob("*")],
)
TEXT = {".py", ".md", ".yaml", ".toml", ".sh", ".json", ".css", ".html"}

OTHERS: dict[str, set[str]] = {}
"""Names spelled by others: file -> words."""


def test_spelling_is_american():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {word}"
        for path in FILES
        if path.suffix in TEXT and path.is_file()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for word in BRITISH.findall(line)
        if word not in OTHERS.get(str(path.relative_to(ROOT)), ())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "word",
    ["re-parameterise", "Normalisation", "centred", "colours", "optimisers", "analysing", "_centre_"],
)
def test_british_forms_are_found(word):
    assert BRITISH.search(word)


@pytest.mark.parametrize(
    "word", ["analysis", "emphasis", "synthesis", "center", "parameters", "diameter", "localis", "greyhound", "precise"]
)
def test_other_words_are_not(word):
    assert not BRITISH.search(word)
