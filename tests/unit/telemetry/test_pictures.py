import matplotlib.colors
import matplotlib.figure
import numpy as np
import pytest
from PIL import Image

from visionfm_jax.telemetry import pictures
from visionfm_jax.telemetry.report import BLUE, GREEN, RED

K, SIDE = 5, 12


def pixels_of(path, colour):
    """How many pixels have exactly this colour."""
    image = np.asarray(Image.open(path).convert("RGB"), int)
    wanted = np.round(np.array(matplotlib.colors.to_rgb(colour)) * 255)
    return int((np.abs(image - wanted).max(-1) <= 1).sum())


def grey(number=0):
    return np.full((SIDE, SIDE, 3), 100 + number, np.uint8)


def queries(ranks, count=K):
    """Queries both ways, of which the right answer stands at the given ranks."""
    captions, images = [], []
    for rank in ranks:
        right = np.arange(1, count + 1) == rank
        shared = {"scores": np.linspace(0.7, -0.1, count, dtype=np.float32), "right": right, "rank": float(rank)}
        texts = [f"a rather long caption with $dollars$ number {i} and more words to cut" for i in range(count)]
        captions.append({"query": grey(), "answers": texts, "own": "the right one", **shared})
        images.append({"query": texts[0], "answers": [grey(i) for i in range(count)], "own": grey(99), **shared})
    return captions, images


@pytest.mark.parametrize(("height", "width"), [(10, 10), (10, 40), (30, 10)])
def test_images_keep_their_ratio_in_the_middle_of_their_square(height, width):
    ax = matplotlib.figure.Figure().add_subplot()
    pictures._picture(ax, np.zeros((height, width, 3), np.uint8), 1.0, 2.0, 6.0, GREEN, 1.0)
    left, right, bottom, top = ax.images[0].get_extent()
    assert (right - left) / (bottom - top) == pytest.approx(width / height)
    assert max(right - left, bottom - top) == pytest.approx(6)
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx((4, 5))


def test_right_answers_are_green_and_missed_ones_shown_in_red(tmp_path):
    for name, ranks in (("right", [1, 1, 1]), ("second", [2, 2, 2]), ("missed", [37, np.inf, 1234])):
        pictures.retrieval(*queries(ranks), tmp_path / f"{name}.png", "run: pairs")
    assert pixels_of(tmp_path / "right.png", RED) == 0
    assert pixels_of(tmp_path / "right.png", GREEN) > 1000
    assert pixels_of(tmp_path / "right.png", pictures.PALE_GREEN) > 5000
    assert pixels_of(tmp_path / "second.png", RED) > 1000  # the frame of the query
    assert pixels_of(tmp_path / "second.png", GREEN) > 1000
    assert pixels_of(tmp_path / "missed.png", GREEN) == pixels_of(tmp_path / "missed.png", pictures.PALE_GREEN) == 0
    assert pixels_of(tmp_path / "missed.png", RED) > 1000
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".png"] == []


@pytest.mark.parametrize(("ranks", "count"), [([1], 5), ([1, 2], 2), ([3], 1), ([1, 2, 3, 4, 5, 6, 7], 5)])
def test_few_and_many_queries_and_answers_fit(tmp_path, ranks, count):
    pictures.retrieval(*queries(ranks, count), tmp_path / "new" / "r.png", "t")
    width, height = Image.open(tmp_path / "new" / "r.png").size
    assert width > 1400
    assert height > 250


def test_scores_that_are_not_finite_are_drawn(tmp_path):
    captions, images = queries([np.inf, 2])
    for query in captions + images:
        query["scores"] = np.full(K, np.nan)
    pictures.retrieval(captions, images, tmp_path / "r.png")
    assert pixels_of(tmp_path / "r.png", RED) > 1000


@pytest.mark.parametrize("count", [1, 9, 20, 40])
def test_a_matrix_is_dark_where_it_is_large(tmp_path, count):
    cells = np.array([[i, i, 3] for i in range(count)])
    pictures.confusion(cells, [f"class {i}" for i in range(count)], tmp_path / "m.png", "t")
    darkest = matplotlib.colormaps["Blues"](1.0)[:3]
    assert pixels_of(tmp_path / "m.png", darkest) > 200 * count


def test_empty_classes_and_guesses_are_drawn(tmp_path):
    pictures.confusion(np.zeros((0, 3), np.int64), "abc", tmp_path / "m.png")
    pictures.confusion(np.zeros((0, 3), np.int64), [str(i) for i in range(50)], tmp_path / "l.png")
    assert pixels_of(tmp_path / "l.png", BLUE) == 0


def test_many_classes_give_the_largest_confusions():
    cells = np.array([[3, 4, 17], [7, 2, 9], [7, 5, 20], *([i, i, 50] for i in range(1000))])
    figure = pictures._largest(cells, [f"c{i}" for i in range(1000)], "t")
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["c7  →  c5", "c3  →  c4", "c7  →  c2"]
    assert [text.get_text().strip() for text in ax.texts] == ["25%  (20 of 79)", "25%  (17 of 67)", "11%  (9 of 79)"]
    cells = np.array([[c, g, 1] for c in range(20) for g in range(20)])
    assert len(pictures._largest(cells, [str(i) for i in range(1000)], "").axes[0].texts) == pictures.LISTED


def written(right, text="a rather long caption with $dollars$ and words to cut " * 5):
    return {"image": grey(), "generated": text, "caption": "the true one", "right": right}


def test_captions_are_green_where_right_and_red_where_not(tmp_path):
    for name, rights in (("right", [True] * 4), ("wrong", [False] * 7)):
        pictures.captions([written(right) for right in rights], tmp_path / f"{name}.png", "run: held out")
    assert pixels_of(tmp_path / "right.png", RED) == pixels_of(tmp_path / "wrong.png", GREEN) == 0
    assert pixels_of(tmp_path / "right.png", GREEN) > 4000
    assert pixels_of(tmp_path / "wrong.png", RED) > 4000
    heights = [Image.open(tmp_path / f"{name}.png").size[1] for name in ("right", "wrong")]
    assert heights[0] < heights[1]  # two rows, three rows


def test_the_true_caption_stands_where_it_differs_and_no_text_leaves_its_cell(tmp_path):
    figures = []
    for right, text in ((True, "W" * 300), (False, "W " * 150), (False, "")):
        path = tmp_path / f"{len(figures)}.png"
        pictures.captions([written(right, text)], path)
        figures.append(np.asarray(Image.open(path).convert("L"), int))
    width = figures[0].shape[1]
    for figure in figures:
        assert (figure[120:, width // 3 + 30 :] > 250).all()  # the two other cells, which are empty
    assert (figures[2] < 100).sum() > 300  # ink of the true one


def test_reconstructions_stand_in_three_rows(tmp_path):
    images = {"image": (250, 0, 0), "seen": (0, 250, 0), "reconstruction": (0, 0, 250)}
    for count in (1, 8):
        shown = {k: np.full((count, SIDE, SIDE, 3), colour, np.uint8) for k, colour in images.items()}
        path = tmp_path / f"{count}.png"
        pictures.reconstructions(shown | {"error": np.full(count, np.nan)}, path, "t")
        pixels = np.asarray(Image.open(path).convert("RGB"), int)
        rows = [np.flatnonzero((pixels == colour).all(-1).any(1)) for colour in images.values()]
        assert rows[0].max() < rows[1].min() <= rows[1].max() < rows[2].min()
        for colour in images.values():
            found = pixels_of(path, np.array(colour) / 255)
            assert found > 30_000 * count


def scene(found=(), wrong=0, missed=0, crowd=0, height=60, width=100):
    """Boxes that are right at 10 pixels from each other, wrong ones and missed objects."""
    count = len(found) + missed + crowd
    boxes = np.array([[10.0 * i, 5, 10 * i + 8, 30] for i in range(count)]).reshape(-1, 4)
    matched = np.array([*range(len(found)), *[-1] * wrong], int)
    wrong_boxes = np.array([[10.0 * i, 35, 10 * i + 8, 58] for i in range(wrong)]).reshape(-1, 4)
    return {
        "key": "a $name$ of a file",
        "image": np.full((height, width, 3), 120, np.uint8),
        "share": 0.5,
        "truth": {
            "boxes": boxes,
            "labels": np.zeros(count, int),
            "crowd": np.arange(count) >= len(found) + missed,
            "found": np.arange(count) < len(found),
        },
        "found": {
            "boxes": np.concatenate([boxes[: len(found)], wrong_boxes]),
            "labels": np.ones(len(matched), int),
            "scores": np.array([*found, *[0.4] * wrong]),
            "matched": matched,
        },
    }


def test_right_boxes_are_green_and_wrong_or_missed_ones_red(tmp_path):
    path = tmp_path / "b.png"
    for shown, green, red in (
        ([scene((0.9, 0.5))], True, False),
        ([scene(wrong=2)], False, True),
        ([scene(missed=1, height=100, width=40)], False, True),
        ([scene(crowd=1)], False, False),
        ([scene(), scene((0.9,), 1, 1, 1), scene((0.2,))], True, True),
        ([], False, False),
    ):
        pictures.boxes(shown, ("a cat", "a dog with a very long name"), 0.25, path, "run: boxes")
        assert (pixels_of(path, GREEN) > 100, pixels_of(path, RED) > 100) == (green, red)


def test_maps_have_the_same_colours_beside_each_other_and_in_the_legend(tmp_path):
    truth = np.zeros((40, 60), int)
    truth[:, 30:], truth[:5] = 1, -1
    entry = {"key": "k", "image": np.full((40, 60, 3), 255, np.uint8), "share": 0.9, "truth": truth}
    colours = pictures.class_colours(3, [0, 1])
    assert len(np.unique(colours, axis=0)) == 3  # two classes and black
    path = tmp_path / "m.png"
    counts = []
    for guess in (truth, np.where(truth == 1, 3, truth)):  # 3: none
        pictures.maps([{**entry, "guess": guess}], ("sky", "sea", "sand"), path, "t")
        counts.append([pixels_of(path, colour / 255) for colour in colours[[0, 1, 3]]])
    (sky, sea, black), (sky_again, half, more_black) = counts
    assert sky == pytest.approx(sky_again, rel=0.05)
    assert sea == pytest.approx(2 * half, rel=0.1)
    assert more_black > black + 5000
    pictures.maps([], ("sky",), path)
    names = [f"class {i}" for i in range(300)]
    pictures.maps([{**entry, "truth": np.arange(2400).reshape(40, 60) % 300, "guess": truth}], names, path, "t")


def test_segments_have_the_colours_of_their_classes(tmp_path):
    number = np.zeros((40, 60), int)
    number[:20], number[20:, 30:] = 1, 2
    image, path = np.zeros((40, 60, 3), np.uint8), tmp_path / "s.png"
    colours = np.round(pictures.class_colours(3, [0, 1])[:2] * 0.6)
    truth = {"map": number, "labels": np.array([0, 1])}
    counts = []
    for found in (truth, {"map": number * (number == 1), "labels": np.array([0])}):
        entry = {"key": "k", "image": image, "share": 0.5, "truth": truth, "found": found}
        pictures.segments([entry], ("sky", "sea", "sand"), path, "t")
        counts.append([pixels_of(path, colour / 255) for colour in colours])
    assert counts[0][0] == pytest.approx(counts[1][0], rel=0.1)
    assert counts[0][1] == pytest.approx(2 * counts[1][1], rel=0.1)
    nothing = {"map": np.zeros((40, 60), int), "labels": np.zeros(0, int)}
    pictures.segments([{**entry, "truth": nothing, "found": nothing}], ("sky",), path)
    pictures.segments([], ("sky",), path)


def test_precision_is_drawn_also_where_there_is_none(tmp_path):
    pictures.precision_recall({"AP50": np.linspace(1, 0, 101), "AP": np.full(101, np.nan)}, tmp_path / "p.png", "t")
    assert pixels_of(tmp_path / "p.png", pictures.BLUE) > 300


def test_draw_picks_the_pictures_by_what_there_is(tmp_path):
    predicted = {"image": np.stack([grey()] * 4), "label": np.array([0, 1, 1, 0]), "guess": np.array([0, 1, 0, -1])}
    predicted["class_names"] = ("cat", "dog")
    captions, images = queries([1, 2])
    assert pictures.draw({}, tmp_path, "none", "t") == []
    got = pictures.draw(predicted, tmp_path, "val", "t")
    assert got == [tmp_path / "predictions_val.png"]
    counted = {**predicted, "confusion": np.array([[0, 0, 1], [1, 0, 1]])}
    got = pictures.draw(counted, tmp_path, "groups", "t")
    assert got == [tmp_path / "predictions_groups.png", tmp_path / "confusion_groups.png"]
    got = pictures.draw({"captions": captions, "images": images}, tmp_path, "pairs", "t")
    assert got == [tmp_path / "retrieval_pairs.png"]
    got = pictures.draw({"generated": [written(True)]}, tmp_path, "pairs", "t")
    assert got == [tmp_path / "captions_pairs.png"]
    reconstructed = {k: np.stack([grey()] * 2) for k in ("image", "seen", "reconstruction")} | {"error": [0.1, 0.2]}
    got = pictures.draw({"reconstructed": reconstructed}, tmp_path, "bare", "t")
    assert got == [tmp_path / "reconstructions_bare.png"]
    detected = {"boxes": [scene()], "worst_boxes": [scene()], "least_score": 0.1, "precision": {"AP": np.zeros(11)}}
    got = pictures.draw({**detected, "class_names": ("cat", "dog")}, tmp_path, "coco", "t")
    assert got == [tmp_path / f"{kind}_coco.png" for kind in ("boxes", "worst_boxes", "precision")]
    cut = {"map": np.zeros((8, 8), int), "labels": np.zeros(0, int)}
    cut = {"key": "k", "image": np.zeros((8, 8, 3), np.uint8), "share": 1.0, "truth": cut, "found": cut}
    got = pictures.draw({"segments": [cut], "worst_segments": [cut], "class_names": ("cat",)}, tmp_path, "cut", "t")
    assert got == [tmp_path / f"{kind}_cut.png" for kind in ("segments", "worst_segments")]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "boxes_coco.png",
        "captions_pairs.png",
        "confusion_groups.png",
        "precision_coco.png",
        "predictions_groups.png",
        "predictions_val.png",
        "reconstructions_bare.png",
        "retrieval_pairs.png",
        "segments_cut.png",
        "worst_boxes_coco.png",
        "worst_segments_cut.png",
    ]


def test_signs_that_the_font_lacks_are_no_warnings(tmp_path, recwarn):
    captions, images = queries([1])
    captions[0]["answers"][0] = images[0]["query"] = "猫 \U0001f600"
    pictures.retrieval(captions, images, tmp_path / "r.png")
    assert [w for w in recwarn if "Glyph" in str(w.message)] == []


def test_captions_become_one_line_and_no_formula():
    assert pictures._short("two\n  lines of $5", 40) == r"two lines of \$5"
    assert pictures._short("abcdef", 4) == "abc…"
