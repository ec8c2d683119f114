"""What routers see: words against scikit-learn and a full SVD, form by hand, scales, and prompts out of scope."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer

from toolkit.errors import CheckpointError
from toolkit.routing import form, scope, words
from toolkit.routing.embedding import EmbeddingSpec
from toolkit.routing.features import Features
from toolkit.routing.spec import FeaturesSpec
from toolkit.routing.words import WordsSpec

TEXTS = [
    f"{a} {b} {i % 7}?"
    for i, (a, b) in enumerate(zip("What Who Why Sort Add".split() * 8, "cat dog sun moon".split() * 10, strict=True))
]


def test_words_are_scikit_learns_tf_idf():
    buckets = 512
    vocabulary = {str(i): i for i in range(buckets)}
    counter = CountVectorizer(
        analyzer=lambda text: [str(zlib.crc32(t.encode()) % buckets) for t in words.terms(text)], vocabulary=vocabulary
    )
    counts = counter.fit_transform(TEXTS)
    expected = TfidfTransformer(sublinear_tf=True).fit_transform(counts).toarray()
    spec = WordsSpec(buckets=buckets, dimensions=None)
    got = words.vectors(TEXTS, words.fit(TEXTS, spec))
    assert sparse.issparse(got)
    np.testing.assert_allclose(got.toarray(), expected, rtol=1e-4, atol=1e-6)


def test_terms_of_a_text():
    assert list(words.terms("Add 12!")) == [
        "add", "12", "!", "\n add", "add 12", "12 !", "! \n",
        "\tAa", "\t0", "\t!",
        "\r Ad", "\rAdd", "\rdd ", "\rd 1", "\r 12", "\r12!", "\r2! ",
    ]  # fmt: skip


def test_directions_are_those_of_a_full_svd():
    full = words.vectors(TEXTS, words.fit(TEXTS, WordsSpec(buckets=512, dimensions=None))).toarray()
    state = words.fit(TEXTS, WordsSpec(buckets=512, dimensions=5))
    _, values, rows = np.linalg.svd(full.astype(np.float64))
    got = words.vectors(TEXTS, state)
    assert got.shape == (40, 5)
    np.testing.assert_allclose(np.linalg.norm(got, axis=0), values[:5], rtol=1e-3)
    np.testing.assert_allclose(got @ got.T, full @ rows[:5].T @ rows[:5] @ full.T, atol=2e-3)


@pytest.mark.parametrize("text", ["", " ", "\ud800", "naïve 中文 ¿qué?"])
def test_any_text_has_vectors(text):
    state = words.fit([*TEXTS, text], WordsSpec(buckets=64, dimensions=4))
    assert np.isfinite(words.vectors([text], state)).all()
    assert np.isfinite(form.vectors([text])).all()
    assert words.vectors([], state).shape == (0, 4)
    assert form.vectors([]).shape == (0, len(form.NAMES))


def test_form_by_hand():
    got = dict(zip(form.NAMES, form.vectors(["What is NOT 3.5, or 12?\nA. one\nB. three"])[0], strict=True))
    counts = {"characters": 39, "words": 11, "lines": 2, "commas": 1, "questions": 1, "numbers": 2, "digits": 4}
    counts |= {"negations": 1, "choices": 2, "letters_per_choice": 4, "formula": 0, "quotes": 0}
    assert {name: np.expm1(got[name]) for name in counts} == pytest.approx(counts, rel=1e-5, abs=1e-6)
    assert got["share_upper"] == pytest.approx(6 / 39)
    assert got["different_words"] == 1
    assert form.vectors(["a a b"])[0, form.NAMES.index("different_words")] == pytest.approx(2 / 3)


def test_kinds_of_features_are_brought_to_one_scale():
    table = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32) * 100 + 7
    features = Features(
        FeaturesSpec(embedding=EmbeddingSpec(model="by hand"), words=WordsSpec(buckets=64, dimensions=8), form=0.5),
        embedder=lambda texts: table[[TEXTS.index(text) for text in texts]],
    )
    vectors = features.fit(TEXTS, quiet=True)
    assert vectors.shape == (40, 3 + 8 + len(form.NAMES))
    np.testing.assert_allclose(vectors.mean(axis=0), 0, atol=1e-5)
    blocks = np.split(vectors, [3, 11], axis=1)
    lengths = [np.sqrt(np.square(block).sum(axis=1).mean()) for block in blocks]
    assert lengths == pytest.approx([1, 1, 0.5], rel=1e-4)
    varied = blocks[2].std(axis=0)
    assert varied[varied > 0] == pytest.approx(varied.max(), rel=1e-3)
    np.testing.assert_array_equal(features(TEXTS[3:9]), vectors[3:9])


def test_sparse_words_stand_beside_other_features():
    features = Features(FeaturesSpec(words=WordsSpec(buckets=64, dimensions=None), form=0.5))
    vectors = features.fit(TEXTS)
    assert sparse.issparse(vectors)
    assert vectors.shape == (40, 64 + len(form.NAMES))
    assert np.sqrt(vectors[:, 64:].power(2).sum(axis=1).mean()) == pytest.approx(0.5, rel=1e-4)


def test_state_of_features_is_checked():
    features = Features(FeaturesSpec(words=WordsSpec(buckets=64, dimensions=4), form=1))
    features.fit(TEXTS)
    features.check()
    for name in ("words.rarity", "words.directions", "form.mean", "form.scale"):
        kept = features.state.pop(name)
        with pytest.raises(CheckpointError, match="is missing"):
            features.check()
        features.state[name] = kept


def test_scope_keeps_the_wanted_share_and_sees_what_is_far():
    rng = np.random.default_rng(0)
    known = rng.standard_normal((2000, 4)).astype(np.float32) + np.array([6, 0, 0, 0])
    references, limit = scope.fit(known[:1000], 0.05)
    new = scope.novelty(known[1000:].astype(np.float32), references)
    assert (new > limit).mean() == pytest.approx(0.05, abs=0.025)
    brute = 1 - max(known[1500] @ r / np.linalg.norm(known[1500]) for r in references)
    assert new[500] == pytest.approx(brute, abs=1e-5)
    assert scope.novelty(-known[:5], references).min() > max(limit, 1)
