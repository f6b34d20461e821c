"""`PackedMatrix.rows`, `prepare` and the way back, `side_by_side`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import random_matrix, random_segments

from lq_kernels import prepare, unprepared
from lq_kernels.prepared import side_by_side
from lq_kernels.reference import reference_weights

pytestmark = pytest.mark.once


@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_of_a_matrix_are_a_matrix(bits):
    w = random_matrix(bits, 300, 16, 64)
    np.testing.assert_array_equal(reference_weights(w.rows(64, 128)), reference_weights(w)[64:192])
    np.testing.assert_array_equal(reference_weights(w.rows(192, 108)), reference_weights(w)[192:])


@pytest.mark.parametrize(("start", "length"), [(16, 64), (32, 64), (0, 100)])
def test_a_cut_inside_a_word_or_a_group_is_refused(start, length):
    with pytest.raises(ValueError, match="is inside a word, or a group of 64"):
        random_matrix(4, 256, 8, 64).rows(start, length)


def test_dequantize_undoes_the_permutation():
    w = random_segments((2, 4), (128, 96), 16)
    want = np.empty((224, 16))
    want[np.asarray(w.permutation)] = reference_weights(w)
    np.testing.assert_allclose(w.dequantize(), want, rtol=1e-6)


def test_a_canonical_layout_is_not_copied():
    w = random_matrix(4, 128, 16)
    assert prepare(w, backend="xla") is w


def test_bytes_are_those_of_the_arrays():
    w = random_matrix(3, 256, 64, 128)
    assert w.nbytes == (3 * 256 * 64) // 8 + 4 * 2 * 64 * 2
    pair = prepare([w, w], backend="xla")
    assert pair.nbytes == 2 * w.nbytes
    assert pair.splits == (64, 64)


def test_side_by_side_and_back():
    a, b = random_segments((2, 4), (128, 96), 16), None
    b = random_segments((2, 4), (128, 96), 8, seed=5)
    b = jax.tree.unflatten(jax.tree.structure(b), jax.tree.leaves(b))
    with pytest.raises(ValueError, match="matrix 1 has another permutation of the input"):
        side_by_side([a, b])
    b = type(b)(segments=b.segments, permutation=a.permutation)
    whole = unprepared(prepare([a, b], backend="xla"))
    np.testing.assert_array_equal(reference_weights(whole)[:, :16], reference_weights(a))
    np.testing.assert_array_equal(reference_weights(whole)[:, 16:], reference_weights(b))


def test_matrices_that_differ_cannot_be_one():
    with pytest.raises(ValueError, match="matrix 1 differs from the first in width, group, dtype or segments"):
        prepare([random_matrix(4, 128, 16), random_matrix(3, 128, 16)])


def test_a_prepared_matrix_is_a_pytree_of_arrays():
    w = prepare([random_matrix(4, 128, 16)], backend="xla")
    doubled = jax.tree.map(lambda a: jnp.concatenate([a, a], -1), w)
    assert jax.tree.structure(doubled) == jax.tree.structure(w)
