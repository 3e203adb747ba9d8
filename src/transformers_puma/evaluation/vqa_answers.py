"""Answers of VQAv2 and VizWiz: the normalisation and the soft accuracy of the VQA challenge.

The rules are those of the challenge (visualqa.org/evaluation.html) as its server's answer processor has them
(`EvalAIAnswerProcessor`, first in Pythia's tasks/processors.py), which LLaVA-1.5 also sends answers through.
"""

import re
from collections.abc import Sequence

NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(), [0, *range(11)], strict=True))
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGITS_COMMA = re.compile(r"(?<=\d),+(?=\d)")
PERIOD = re.compile(r"\.(?!\d)")  # a period before a digit is a decimal point

# A word that lacks one of these apostrophes gets it back. "let's", "she's" and the like are not among them, since
# without it they are other words.
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
    wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# Of these only the doubled forms are: "shed" and "wed" are words.
PARTIAL_CONTRACTIONS = {"shed've": "she'd've", "she'dve": "she'd've", "wed've": "we'd've", "we'dve": "we'd've"}


def _missing_apostrophes() -> dict[str, str]:
    known = {"somebody'd": "somebodyd", **PARTIAL_CONTRACTIONS}  # the first as the challenge has it
    for word in CONTRACTIONS.split():
        for place in re.finditer("'", word):
            known[word[: place.start()] + word[place.end() :]] = word
    return known


MISSING_APOSTROPHES = _missing_apostrophes()


def normalize_answer(answer: str) -> str:
    """Lower case, without articles and punctuation, numbers to ten as digits, contractions with their apostrophes."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return _normalize_words(_strip_punctuation(text))


def _strip_punctuation(text: str) -> str:
    stripped = text
    for mark in PUNCTUATION:
        # A mark beside a space, or anywhere in a text with 1,000, leaves nothing behind, else a space.
        is_loose = f"{mark} " in text or f" {mark}" in text or DIGITS_COMMA.search(text)
        stripped = stripped.replace(mark, "" if is_loose else " ")
    return PERIOD.sub("", stripped)


def _normalize_words(text: str) -> str:
    words = (str(NUMBERS.get(word, word)) for word in text.split())
    return " ".join(MISSING_APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Soft accuracy of a normalised prediction: min(1, people who said so / 3), averaged over all ways to leave one
    of the people out (visualqa.org/evaluation.html).

    With ten people: 0, 0.3, 0.6, 0.9 and 1 for 0, 1, 2, 3 and more matches.

    Args:
        answers: of the people, as they are in the files; each is normalised as the prediction was. (The challenge's
            own script leaves answers alone where all people agree; there a prediction that was normalised, as its
            server's users do, could not match "t-shirt".)
    """
    matches = [normalize_answer(answer) == prediction for answer in answers]
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(matches)
