"""What every quantizer must give, whichever it is: codes that can be packed, and scales and zeros that fit them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lq.calibration.statistics import reduce_inputs
from lq.errors import UserError
from lq.numerics.qtensor import QTensor
from lq.numerics.spec import QuantSpec
from lq.quantizers import QUANTIZERS

K, N = 80, 12  # of groups of 32 the last has 16 rows


def weight_of(*lead):
    return np.random.default_rng(0).standard_normal((*lead, K, N)).astype(np.float32)


def statistics(method, *lead, rows=slice(None), silent=0):
    """What `method` needs of random correlated inputs, of their channels `rows`; None when it needs nothing.

    Channels from 64 on have nothing to do with those before, and all have the same energy: what is made of them does
    not depend on whether the others are there. The first `silent` channels are zero.
    """
    needs = QUANTIZERS[method].needs - {"calibration"}
    if not needs:
        return None
    rng = np.random.default_rng(1)
    mixed = rng.standard_normal((*lead, 200, K)) @ (np.eye(K) + rng.standard_normal((K, K)) / 10)
    x = jnp.asarray(np.sign(mixed) * (np.arange(200)[:, None] % 2 == (np.arange(K) >= 64)) * (np.arange(K) >= silent))
    reduce = functools.partial(reduce_inputs, needs=needs)
    for _ in lead:
        reduce = jax.vmap(reduce)
    return reduce(x[..., rows])


def quantizer(method, spec, stats):
    """A function of the weight alone."""
    few = {"steps": 20} if hasattr(QUANTIZERS.options(method, {}), "steps") else {}
    return lambda weight: QUANTIZERS[method].function(weight, stats, spec, QUANTIZERS.options(method, few))


def loss(spec, arrays):
    """tr(D^T H D) over tr(W^T H W), in float64, whether or not the method looks at H."""
    weight, moment = weight_of().astype(np.float64), np.asarray(statistics("gptq").hessian, np.float64)
    error = np.asarray(QTensor.from_codes(*arrays, spec).dequantize(), np.float64) - weight
    return np.sum(error * (moment @ error)) / np.sum(weight * (moment @ weight))


@functools.cache
def found(method, spec):
    """Codes, scales and zeros of the weight; the same for every test that asks."""
    return quantizer(method, spec, statistics(method))(weight_of())


def assert_alike(method, some, others):
    """The same but for rounding in another order: of 960 weights no more than a few lie on a tie, and what is learned
    carries a last bit through all of its steps, whose order of sums is the processor's."""
    learns = QUANTIZERS[method].block is not None
    (codes, scales, *zeros), (other_codes, other_scales, *other_zeros) = some, others
    assert (np.asarray(codes) != np.asarray(other_codes)).mean() <= (0.06 if learns else 0.01)
    if learns:
        np.testing.assert_allclose(scales, other_scales, rtol=2.0**-6)
    else:
        assert (np.asarray(scales) != np.asarray(other_scales)).mean() <= 0.01
    for a, b in zip(jax.tree.leaves(zeros), jax.tree.leaves(other_zeros), strict=True):
        assert (np.asarray(a) != np.asarray(b)).mean() <= 0.03, "one of 36"


def refusal(method, **spec):
    """The line with which the method's check refuses such a spec, or None."""
    try:
        if check := QUANTIZERS[method].check:
            check(QUANTIZERS.options(method, {}), QuantSpec(bits=3, **spec))
    except UserError as error:
        return str(error)


CASES = [(method, symmetric) for method in QUANTIZERS for symmetric in (False, True)]
IDS = {False: "asymmetric", True: "symmetric"}
ACCEPTED = pytest.mark.parametrize(
    ("method", "symmetric"),
    [pytest.param(m, s, id=f"{m}-{IDS[s]}") for m, s in CASES if refusal(m, symmetric=s) is None],
)


@ACCEPTED
@pytest.mark.parametrize(
    ("bits", "group_size", "scale_dtype"),
    [(1, 32, "bfloat16"), (3, 32, "bfloat16"), (8, 32, "bfloat16"), (3, None, "float16"), (3, 32, "float32")],
)
def test_codes_scales_and_zeros(method, bits, symmetric, scale_dtype, group_size):
    spec = QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    codes, scales, zeros = found(method, spec)
    groups = 1 if group_size is None else 3
    assert codes.shape == (K, N)
    assert scales.shape == (groups, N)
    assert codes.dtype == jnp.uint32
    assert 2 ** (bits - 1) <= int(codes.max()) <= 2**bits - 1, "in range, and its upper half is used"
    assert np.isfinite(np.asarray(scales, np.float32)).all()
    assert (np.asarray(scales) != 0).all()
    stored = np.asarray(scales.astype(scale_dtype).astype(jnp.float32))
    np.testing.assert_array_equal(stored, np.asarray(scales, np.float32), err_msg="codes fit the scale as stored")
    assert (zeros is None) == symmetric
    if zeros is not None:
        assert zeros.shape == (groups, N)
        assert zeros.dtype == jnp.uint32
        assert int(zeros.max()) <= 2**bits - 1


@pytest.mark.once
@ACCEPTED
@pytest.mark.parametrize("bits", [1, 3])
def test_the_weights_stay_within_the_signal(method, bits, symmetric):
    """The error is less than the weights themselves, in every group: at one bit too, where two levels are left."""
    weight = weight_of()
    spec = QuantSpec(bits=bits, group_size=32, symmetric=symmetric)
    tensor = QTensor.from_codes(*found(method, spec), spec)
    error = np.asarray(tensor.dequantize()) - weight
    if bits == 1 and not symmetric:
        assert np.square(error).mean() < 2 * np.square(weight).mean(), "zero and one end of the range are its levels"
        return
    for rows in np.split(np.arange(K), [32, 64]):
        assert np.square(error[rows]).sum() < np.square(weight[rows]).sum()


@ACCEPTED
def test_eight_bits_lose_less_than_a_hundredth_of_the_outputs(method, symmetric):
    """In root mean square. Of 32 normal weights the largest is two standard deviations, a step a 60th of them and its
    root mean square error a 200th; some clip a little more, those that are calibrated lose less."""
    spec = QuantSpec(bits=8, group_size=32, symmetric=symmetric)
    assert loss(spec, found(method, spec)) <= 0.01**2


@pytest.mark.long
@pytest.mark.once
@ACCEPTED
def test_under_jit(method, symmetric):
    spec = QuantSpec(bits=3, group_size=32, symmetric=symmetric)
    plain, jitted = found(method, spec), jax.jit(quantizer(method, spec, statistics(method)))(weight_of())
    learns = QUANTIZERS[method].block is not None
    assert jax.tree.structure(plain) == jax.tree.structure(jitted)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(jitted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        # Fused arithmetic may move a weight that lies on a tie; of 960 no more than a few do.
        assert learns or (np.asarray(a) != np.asarray(b)).mean() <= 0.01
    if learns:  # hundreds of steps carry a last bit far: other codes, as good
        losses = [loss(spec, arrays) for arrays in (plain, jitted)]
        assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.long
@pytest.mark.once
@ACCEPTED
def test_a_stack_is_quantized_matrix_by_matrix(method, symmetric):
    spec, stack = QuantSpec(bits=3, group_size=32, symmetric=symmetric), weight_of(2)
    stats = statistics(method, 2)
    stacked = quantizer(method, spec, stats)(stack)
    assert stacked[0].shape == (2, K, N)
    assert stacked[1].shape == (2, 3, N)
    alone = jax.jit(lambda weight, stats: quantizer(method, spec, stats)(weight))
    for i in range(2):
        of_one = alone(stack[i], jax.tree.map(lambda field: field[i], stats))  # noqa: B023
        assert_alike(method, jax.tree.map(lambda array: array[i], stacked), of_one)  # noqa: B023


@pytest.mark.long
@pytest.mark.once
@ACCEPTED
def test_the_short_last_group_is_as_if_it_were_alone(method, symmetric):
    """Its padding has no say: with the rows before it far from zero and without them it gets the same codes."""
    spec, weight = QuantSpec(bits=3, group_size=32, symmetric=symmetric), weight_of()
    weight[64:] += 5.0
    # What is learned of a group is kept or not by the error of its whole output channel: it must be this group's alone.
    silent = 64 if QUANTIZERS[method].block else 0
    whole = quantizer(method, spec, statistics(method, silent=silent))(weight)
    alone = quantizer(method, spec, statistics(method, rows=slice(64, None)))(weight[64:])
    last = (whole[0][64:], whole[1][2:])
    if silent:  # sums over more channels round otherwise
        assert_alike(method, last, alone[:2])
    else:
        np.testing.assert_array_equal(last[0], alone[0])
        np.testing.assert_array_equal(last[1], alone[1])


@pytest.mark.parametrize(("method", "symmetric"), CASES)
def test_what_its_check_refuses_the_function_refuses_in_the_same_line(method, symmetric):
    line = refusal(method, symmetric=symmetric)
    run = quantizer(method, QuantSpec(bits=3, symmetric=symmetric), statistics(method))
    if line is None:
        run(weight_of())
        return
    assert re.fullmatch(rf"{method}: [^\n]+; write [^\n]+", line)
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        run(weight_of())


@pytest.mark.parametrize("method", [m for m in QUANTIZERS if refusal(m, zero_dtype="bfloat16") is None])
@pytest.mark.parametrize(("bits", "zero_dtype"), [(1, "bfloat16"), (3, "bfloat16"), (3, "float16"), (8, "float32")])
def test_zero_points_of_a_dtype_of_their_own(method, bits, zero_dtype):
    spec = QuantSpec(bits=bits, group_size=32, zero_dtype=zero_dtype)
    codes, scales, zeros = found(method, spec)
    assert zeros.shape == scales.shape == (3, N)
    assert zeros.dtype == jnp.float32
    assert 0 <= float(zeros.min()) <= float(zeros.max()) <= 2**bits, "what the kernels take"
    stored = np.asarray(zeros.astype(zero_dtype).astype(jnp.float32))
    np.testing.assert_array_equal(stored, np.asarray(zeros), err_msg="codes fit the zero point as stored")
    error = np.asarray(QTensor.from_codes(codes, scales, zeros, spec).dequantize()) - weight_of()
    # Two levels at the ends of the range leave about the weights themselves, eight levels a fifth of them, and 256 a
    # two-hundredth.
    assert np.square(error).sum() < np.square(weight_of()).sum() * {1: 2, 3: 0.25, 8: 0.01**2}[bits]
