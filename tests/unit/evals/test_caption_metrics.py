"""Scores of captions against numbers of COCO's own code, and their edges."""

import pytest

from visionfm_jax.evals.caption_metrics import bleu4, cider, exact, words

CAPTIONS = (
    (
        "a man riding a wave on top of a surfboard",
        "A man riding a wave on a surfboard.",
        "a surfer rides a big wave in the ocean",
        "A man on top of a surfboard, riding a wave!",
    ),
    ("a cat sitting on a couch next to a dog", "a cat and a dog on a couch", "A cat sits next to a dog."),
    (
        "two people play tennis",
        "two men playing tennis on a court",
        "people play tennis",
        "Two people are on a tennis court",
        "a tennis match",
    ),
    ("A plate of food", "A plate of food with broccoli and rice", "a white plate topped with food"),
    (
        "a red bus drives down the street the street the street",
        "a red double-decker bus driving down the street",
        "the bus drives down a street",
    ),
    ("a dog", "a dog", "the dog"),
    ("bird", "a small bird sits on a branch"),
    ("", "an empty street"),
    (
        "a woman isn't holding her well-worn umbrella in the rain",
        "a woman holding an umbrella in the rain",
        "a woman isn't holding her well-worn umbrella",
    ),
)
HYPOTHESES = [caption for caption, *_ in CAPTIONS]
REFERENCES = [references for _, *references in CAPTIONS]


def test_cider_and_bleu_are_those_of_coco():
    # pycocoevalcap 1.2 (Cider, Bleu) on the same captions, in the words of `words`; its Bleu adds 1e-9 to some counts
    assert cider(HYPOTHESES, REFERENCES) == pytest.approx(2.782918132363106, rel=1e-12)
    assert bleu4(HYPOTHESES, REFERENCES) == pytest.approx(0.606304457284467, rel=1e-9)
    assert cider(HYPOTHESES[:3], REFERENCES[:3]) == pytest.approx(3.4205713685541284, rel=1e-12)
    assert bleu4(HYPOTHESES[:3], REFERENCES[:3]) == pytest.approx(0.6694027528110988, rel=1e-9)


def test_words():
    assert words("A dog, the dog's  T-shirt: 3rd place (UFO)!  – “no”.") == [
        *("a", "dog", "the", "dog's", "t-shirt", "3rd", "place", "ufo", "no")
    ]  # fmt: skip
    assert words(" .,\n") == []


def test_best_and_worst():
    same = [[text] for text in ("one two three four five", "a b c d e f", "red green blue and white")]
    texts = [text for (text,) in same]
    assert bleu4(texts, same) == pytest.approx(1)
    assert cider(texts, same) == pytest.approx(10)
    assert bleu4(["x"] * 3, same) == cider(["x"] * 3, same) == 0
    assert bleu4([""] * 3, same) == cider([""] * 3, same) == 0
    assert cider(texts[:1], same[:1]) == 0  # no n-gram is rarer than another


def test_order_is_free():
    turned = cider(HYPOTHESES[::-1], REFERENCES[::-1]), bleu4(HYPOTHESES[::-1], [r[::-1] for r in REFERENCES[::-1]])
    assert turned == pytest.approx((cider(HYPOTHESES, REFERENCES), bleu4(HYPOTHESES, REFERENCES)))


def test_exact_tells_everything_but_white_space_apart():
    references = [["a  cat ", "a dog"]] * 4
    assert exact([" a cat", "a\ndog", "A cat", "a cat."], references) == 0.5


@pytest.mark.parametrize("metric", [exact, bleu4, cider])
def test_captions_without_references_are_refused(metric):
    for hypotheses, references in (([], []), (["a"], []), (["a", "b"], [["a"], []])):
        with pytest.raises(ValueError, match=r"captions, . lists of references"):
            metric(hypotheses, references)
