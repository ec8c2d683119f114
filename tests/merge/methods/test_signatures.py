"""`signatures` against its formula in float64, with the oracles of Robust Weight Signatures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tests.merge.laws import Arrays, Example, run, settings
from toolkit.errors import SpecError
from toolkit.merge.method import load_method
from toolkit.merge.run import merge

RNG = np.random.default_rng(0)
ROLES = ("clean", "corrupt", "corrupt")
EXAMPLE = Example(
    {"role": ROLES, "weight": (1.0, 0.5, 0.3)}, neutral={"role": ROLES, "weight": (1.0, 0.5, 0.3)}, rtol=3e-5
)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    return tiny.save_model(tiny.tuned(tiny.llama(), 1), tmp_path_factory.mktemp("tuned") / "tuned")


def signature(delta: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """What is left of a delta without its part along the clean one."""
    return delta - (delta * clean).sum() / (clean * clean).sum() * clean


@pytest.mark.system("rws")
@pytest.mark.parametrize("shape", [(700,), (30, 20), (3, 4, 50)])
def test_signatures_are_added_to_the_clean_model(shape):
    x = RNG.standard_normal((3, *shape)) + 1
    expected = x[0] + 0.5 * signature(x[1], x[0]) - 2 * signature(x[2], x[0])
    got = run("signatures", x, role=ROLES, weight=(7.0, 0.5, -2.0))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.system("rws")
def test_a_target_is_patched_in_place_of_the_clean_model():
    x = RNG.standard_normal((4, 40, 25)) + 1
    roles = ("corrupt", "target", "clean", "corrupt")
    expected = x[1] + 0.5 * signature(x[0], x[2]) + 0.25 * signature(x[3], x[2])
    got = run("signatures", x, role=roles, weight=(0.5, 1.0, 1.0, 0.25))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.system("rws")
def test_a_signature_is_orthogonal_to_the_clean_direction():
    x = RNG.standard_normal((2, 200_000)) + 2
    found = run("signatures", x, role=("clean", "corrupt")).astype(np.float64) - x[0].astype(np.float32)
    cosine = found @ x[0] / np.linalg.norm(found) / np.linalg.norm(x[0])
    assert abs(cosine) < 1e-7
    assert np.linalg.norm(found) > 0.4 * np.linalg.norm(x[1])


@pytest.mark.system("rws")
@pytest.mark.parametrize("given", [{"weight": (0.0,)}, {"keep_layers": 0}])
def test_no_weight_and_no_layers_are_the_identity(given):
    x = RNG.standard_normal((3, 500)).astype(np.float32)
    np.testing.assert_array_equal(run("signatures", x, role=ROLES, **given), x[0])
    np.testing.assert_array_equal(run("signatures", x, role=("corrupt", "clean", "target"), **given), x[2])


@pytest.mark.system("rws")
def test_deeper_layers_are_untouched():
    x = RNG.standard_normal((3, 500)).astype(np.float32)
    patched = run("signatures", x, role=ROLES)
    assert not np.allclose(patched, x[0])
    shallow = [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.input_layernorm.weight",
    ]
    deep = [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.11.mlp.up_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    for name in shallow:
        np.testing.assert_array_equal(run("signatures", x, name, role=ROLES, keep_layers=2), patched)
    for name in deep:
        np.testing.assert_array_equal(run("signatures", x, name, role=ROLES, keep_layers=2), x[0])
        np.testing.assert_array_equal(run("signatures", x, name, role=ROLES), patched)


@pytest.mark.system("rws")
def test_order_of_patches_does_not_matter():
    x = RNG.standard_normal((5, 800)) + 1
    roles, weights = ("clean", *("corrupt",) * 4), np.array([1.0, 0.5, 0.7, -0.2, 1.5])
    whole = run("signatures", x, role=roles, weight=tuple(weights))
    for _ in range(5):
        order = np.concatenate([[0], RNG.permutation(4) + 1])
        got = run("signatures", x[order], role=roles, weight=tuple(weights[order]))
        np.testing.assert_allclose(got, whole, rtol=1e-5, atol=1e-5)
    # One after the other, each on what the one before gave.
    patched = x[0]
    for delta, weight in zip(x[1:], weights[1:], strict=True):
        given = {"role": ("clean", "corrupt", "target"), "weight": (1.0, float(weight), 1.0)}
        patched = run("signatures", np.stack([x[0], delta, patched]), **given)
    np.testing.assert_allclose(patched, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.system("rws")
def test_a_patch_taken_out_again_leaves_rounding_errors_and_a_log_of_the_change_none():
    base = RNG.standard_normal(2000).astype(np.float32)
    stored = base + np.float32(0.1) * RNG.standard_normal((2, 2000)).astype(np.float32)
    roles = ("clean", "corrupt", "target")
    patched, weight = stored[0], 0.7
    for sign in (1, -1):
        deltas = np.stack([stored[0], stored[1], patched]) - base
        before, patched = patched, base + run("signatures", deltas, role=roles, weight=(1.0, sign * weight, 1.0))
        if sign == 1:
            assert not np.allclose(patched, before, atol=1e-3)
            log = patched.view(np.uint32) ^ before.view(np.uint32)
            assert ((patched.view(np.uint32) ^ log) == stored[0].view(np.uint32)).all()
    np.testing.assert_allclose(patched, stored[0], atol=1e-6)
    assert (patched != stored[0]).any()


def test_projection_on_the_whole_model():
    parts = [(RNG.standard_normal((3, 200)) + shift) * scale for shift, scale in ((1, 1), (-2, 3), (0, 1))]
    names = ["layers.0.a", "layers.0.b", "layers.5.a"]
    loaded = load_method("signatures")
    given = {"role": ROLES, "projection": "model", "keep_layers": 1, "weight": (1.0, 0.5, 2.0)}
    params = settings("signatures", given, 3)
    streams = [(Arrays(x, name=name), params) for x, name in zip(parts, names, strict=True)]
    whole = np.concatenate(parts[:2], axis=1)
    patched = whole[0] + 0.5 * signature(whole[1], whole[0]) + 2 * signature(whole[2], whole[0])
    expected = np.concatenate([patched, parts[2][0]])
    apart = [x[0] + 0.5 * signature(x[1], x[0]) + 2 * signature(x[2], x[0]) for x in parts[:2]]
    assert not np.allclose(np.concatenate(apart), patched, atol=0.1), "the projections differ"
    own = settings("signatures", given | {"projection": "tensor"}, 3)
    streams.append((Arrays(parts[0], name="layers.0.c"), own))
    expected = np.concatenate([expected, apart[0]])
    for i, ((tensor, params), surveyed) in enumerate(zip(streams, loaded.survey(streams), strict=True)):
        tensor.surveyed = surveyed
        state = loaded.prepare(tensor, params)
        got = np.concatenate([loaded.combine(c, params, state, start) for start, c in tensor.stacked()])
        np.testing.assert_allclose(got, expected[200 * i : 200 * (i + 1)], rtol=1e-5, atol=1e-5)


def test_mean_of_the_corrupt_models():
    x = RNG.standard_normal((4, 300))
    roles = ("corrupt", "target", "clean", "corrupt")
    for keep_layers in (None, 0):
        got = run("signatures", x, role=roles, weight=(0.1,), patch="mean", keep_layers=keep_layers)
        np.testing.assert_allclose(got, (x[0] + x[3]) / 2, rtol=1e-5, atol=1e-6)


def test_a_clean_model_that_is_the_base_has_no_direction():
    x = RNG.standard_normal((2, 300))
    x[0] = 0
    got = run("signatures", x, role=("clean", "corrupt"), weight=(1.0, 0.5))
    np.testing.assert_allclose(got, 0.5 * x[1], rtol=1e-6)


@pytest.mark.system("rws")
def test_loss_of_a_patched_regression_is_that_of_its_weights(record_property):
    """Two linear regressions from one start; the loss on shifted data along the weight is recorded, not judged."""
    inputs, truth = RNG.standard_normal((200, 12)), RNG.standard_normal(12)
    shifted = inputs + 0.5 * RNG.standard_normal((1, 12)) + 0.3 * RNG.standard_normal((200, 12))
    answers = inputs @ truth
    start = RNG.standard_normal(12)
    clean, corrupt = (np.linalg.lstsq(data, answers, rcond=None)[0] - start for data in (inputs, shifted))
    for weight in (0.0, 0.5, 1.0):
        patched = start + run("signatures", np.stack([clean, corrupt]), role=("clean", "corrupt"), weight=(1.0, weight))
        exact = start + clean + weight * signature(corrupt, clean)
        losses = [float(np.square(shifted @ weights - answers).mean()) for weights in (patched, exact)]
        record_property(f"loss at {weight}", losses[0])
        assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "roles", [("corrupt", "corrupt"), ("clean", "clean"), ("clean", "target"), ("clean", "corrupt", "target", "target")]
)
def test_roles_that_do_not_fit_together(roles, base, tuned, tmp_path):
    models = [{"model": str(tuned), "parameters": {"role": role}} for role in roles]
    spec = {"merge_method": "signatures", "base_model": str(base), "models": models}
    with pytest.raises(SpecError, match=r"parameters\.role: .*needs one clean model, one corrupt or more"):
        merge(spec, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
