"""What the thresholds of near copies let through, on real sets.

Brain Tumor MRI: how far each test image is from its nearest training image, as it is and turned or
mirrored; how often training images at each distance differ in their label. MedQA against
MedXpertQA: how many of the pairs that a comparison of all with all finds MinHash finds too.

    OCTOMED_DATA=... python tests/soak/near_duplicates.py
        three minutes; writes outputs/reference/soak/near_duplicates.json
"""

import sys
import time
from collections import Counter
from itertools import chain

import numpy as np
from PIL import Image

from octomed import load
from octomed.core.files import write_json
from octomed.core.identity import make_card
from octomed.core.paths import root
from octomed.data.near_duplicates import (
    SAME_PICTURE,
    SAME_SCAN,
    _index_stems,
    _sign,
    compare_words,
    count_different_bits,
    hash_picture,
    list_words,
    open_picture,
    weigh_words,
)

TRAIN, TEST = "brain_tumor:train", "brain_tumor:test"
TURNS = list(Image.Transpose)  # the seven other orientations
EDGES = (0, 32, 48, 56, 64)  # bits
TEXTS, BENCH = ("medqa:train", "medqa:dev", "medqa:test"), "medxpertqa_text:test"


def hash_small(img: Image.Image) -> np.ndarray:
    "The hash of 64 bits that is usual."
    import imagehash

    return imagehash.phash(img.convert("L")).hash.ravel()


def measure_distances(train, test) -> dict:
    "The nearest training image of each test image without a pixel twin."
    pixels = {q.images[0] for q in train}
    rest = [q for q in test if q.images[0] not in pixels]
    pictures = [open_picture(q.images[0]) for q in rest]
    known = np.array([hash_picture(open_picture(q.images[0])) for q in train])
    nearest = count_different_bits(np.array([hash_picture(p) for p in pictures]), known).min(1)
    turned = [[hash_picture(p.transpose(turn)) for turn in TURNS] for p in pictures]
    around = count_different_bits(np.array(list(chain.from_iterable(turned))), known).min(1)
    small = np.array([hash_small(open_picture(q.images[0])) for q in train])
    usual = count_different_bits(np.array([hash_small(p) for p in pictures]), small).min(1)
    return {
        "without_pixel_twin": len(rest),
        "nearest_bits": sorted(nearest.tolist()),
        "turned_within_same_scan": int((around.reshape(len(rest), -1).min(1) <= SAME_SCAN).sum()),
        "within_16_of_64_bits": int((usual <= 16).sum()),
        "labels_at": count_labels(known, [q.answer_text for q in train]),
    }


def count_labels(hashes: np.ndarray, labels: list[str]) -> list[dict]:
    "Pairs of distinct training images by their distance, and how many differ in their label."
    bits, labels = count_different_bits(hashes, hashes), np.array(labels)
    above = np.triu(np.ones(bits.shape, bool), k=1)
    differ = labels[:, None] != labels
    rows = []
    for low, high in zip((-1, *EDGES[1:-1]), EDGES[1:], strict=True):
        inside = above & (bits > low) & (bits <= high)
        rows.append(
            {
                "from": low + 1,
                "to": high,
                "pairs": int(inside.sum()),
                "other_label": int((inside & differ).sum()),
            }
        )
    return rows


def list_distinct_words(questions) -> list[frozenset]:
    "The words of each stem, equal ones once."
    return list(dict.fromkeys(frozenset(list_words(q.stem)) for q in questions))


def measure_texts() -> dict:
    "The pairs that are alike by all comparisons, and those of them that MinHash proposes."
    words = list_distinct_words(chain.from_iterable(load(spec) for spec in TEXTS))
    others = list_distinct_words(load(BENCH))
    weights = weigh_words([*words, *others])
    index = _index_stems(others, weights)
    alike, proposed = Counter(), Counter()
    for own, signature in zip(words, _sign(words, weights), strict=True):
        candidates = set(index.query(signature))
        for i, other in enumerate(others):
            score = compare_words(own, other, weights)
            if score >= 0.4:
                part = "0.5 and more" if score >= 0.5 else "0.4 to 0.5"
                alike[part] += 1
                proposed[part] += i in candidates
    return {
        "stems": len(words),
        "benchmark_stems": len(others),
        "pairs": dict(alike),
        "proposed": dict(proposed),
    }


def main():
    started = time.time()
    train, test = load(TRAIN), load(TEST)
    images = measure_distances(train, test)
    texts = measure_texts()
    good = texts["proposed"]["0.5 and more"] == texts["pairs"]["0.5 and more"]
    card = make_card(minutes=round((time.time() - started) / 60, 1))
    rows = {"thresholds": [SAME_PICTURE, SAME_SCAN], "images": images, "texts": texts}
    write_json(
        root() / "outputs" / "reference" / "soak" / "near_duplicates.json",
        {**rows, "good": good, "card": card},
    )
    print(rows)
    sys.exit(not good)


if __name__ == "__main__":
    main()
