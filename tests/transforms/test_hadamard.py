"""Rotations: where they are, who sees rotated activations, what they are good for, and whom they are refused to."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from random_models import TOKENS, config_of, logits, random_model, relative_difference
from small_models import llama_config, random_params

import lq
from lq.catalogue import catalogue
from lq.errors import UserError
from lq.models.config import Rotation
from lq.models.context import DecodeState, context_for
from lq.models.decoder import Decoder, apply_block, embed
from lq.models.fingerprint import fingerprint
from lq.models.layers import Linear, StackedLinear
from lq.models.source import InMemory
from lq.numerics.hadamard import randomized_hadamard
from lq.quantizers import SCALINGS, quantize_matrix
from lq.quantizers.rtn import RTNOptions
from lq.transforms import TRANSFORMS, TransformedSource, transform
from lq.transforms.rewrite import READS, WRITES

pytestmark = pytest.mark.once

EXACT = 1e-13  # see test_preserved.py
EVERYWHERE = {"heads": True, "down": True}


def exactly(config, params, method: str, **options):
    """Transformed in float64."""
    with jax.enable_x64(True):
        return transform(config, params, method, options)


def rotated(name: str, **options):
    return exactly(*random_model(name), "hadamard", **options)


def stream_of(config, params) -> list[np.ndarray]:
    """The residual stream behind the embedding and behind each block, float64."""
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, params)
        context = context_for(TOKENS)
        hidden = [embed(config, params, TOKENS, context)]
        for i, kind in enumerate(config.kinds):
            hidden.append(apply_block(config, kind, params[f"block_{i}"], hidden[-1], context))
        return [np.asarray(h) for h in hidden]


@pytest.mark.parametrize("name", ["llama, untied", "llama, tied", "qwen3_moe, untied", "gpt2, tied", "opt, untied"])
def test_the_residual_stream_is_the_originals_rotated(name):
    """Less its mean where norms were LayerNorms."""
    config, params = random_model(name)
    R = randomized_hadamard(config.hidden_size, 3, "residual")
    for before, after in zip(stream_of(config, params), stream_of(*rotated(name, seed=3)), strict=True):
        if config.norm == "layernorm":
            before = before - before.mean(-1, keepdims=True)
        assert relative_difference(before @ R, after) <= EXACT


def inputs_of(config, params, block: int = 0) -> dict[str, np.ndarray]:
    """What reaches the matrices of the blocks, by name: the last that was seen, as a calibration would see it."""
    seen = {}

    def observe(call, args, kwargs, context):
        if isinstance(context.module, Linear | StackedLinear) and context.method_name == "__call__":
            seen[context.module.name] = np.asarray(args[0])
        return call(*args, **kwargs)

    with jax.enable_x64(True), nn.intercept_methods(observe):
        context = context_for(TOKENS)
        params = jax.tree.map(jnp.asarray, params)
        h = embed(config, params, TOKENS, context)
        apply_block(config, config.kinds[block], params[f"block_{block}"], h, context)
    return seen


@pytest.mark.parametrize("name", ["llama, tied", "mixtral, untied", "opt, tied", "gemma3_text, tied"])
def test_who_watches_a_matrix_sees_rotated_inputs(name):
    """o_proj: across the heads and, with `values`, within each; down_proj, of experts too."""
    config, params = random_model(name)
    before = inputs_of(config, params)
    after = inputs_of(*rotated(name, residual=False, seed=2, **EVERYWHERE))
    across = randomized_hadamard(config.num_heads, 2, "heads")
    within = randomized_hadamard(config.head_dim, 2, "values block_0")
    assert relative_difference(before["o_proj"] @ np.kron(across, within), after["o_proj"]) <= EXACT
    down = randomized_hadamard(before["down_proj"].shape[-1], 2, "down")
    assert relative_difference(before["down_proj"] @ down, after["down_proj"]) <= EXACT


def test_weights_are_the_products_of_the_papers():
    """Written out with matrices, of a model with grouped heads and biases: R1^T diag(g) W R2 and so on."""
    config, params = random_model("llama, untied")
    _, new = rotated("llama, untied", seed=1, **EVERYWHERE)
    R1, down = (randomized_hadamard(n, 1, p) for n, p in [(config.hidden_size, "residual"), (40, "down")])
    R2 = randomized_hadamard(config.head_dim, 1, "values block_1")
    across = np.kron(randomized_hadamard(config.num_heads, 1, "heads"), R2)
    kv_heads = np.kron(np.eye(config.num_kv_heads), R2)
    old, block = params["block_1"], new["block_1"]
    gain, mlp_gain = (np.diag(old[norm]["scale"]) for norm in ("attention_norm", "mlp_norm"))
    attention, mlp = old["attention"], old["mlp"]
    expected = {
        ("attention", "q_proj", "kernel"): R1.T @ gain @ attention["q_proj"]["kernel"],
        ("attention", "q_proj", "bias"): attention["q_proj"]["bias"],
        ("attention", "v_proj", "kernel"): R1.T @ gain @ attention["v_proj"]["kernel"] @ kv_heads,
        ("attention", "v_proj", "bias"): attention["v_proj"]["bias"] @ kv_heads,
        ("attention", "o_proj", "kernel"): across.T @ attention["o_proj"]["kernel"] @ R1,
        ("attention", "o_proj", "bias"): attention["o_proj"]["bias"] @ R1,
        ("mlp", "up_proj", "kernel"): R1.T @ mlp_gain @ mlp["up_proj"]["kernel"],
        ("mlp", "down_proj", "kernel"): down.T @ mlp["down_proj"]["kernel"] @ R1,
        ("mlp", "down_proj", "bias"): mlp["down_proj"]["bias"] @ R1,
    }
    for (part, matrix, leaf), value in expected.items():
        assert relative_difference(value, np.asarray(block[part][matrix][leaf])) <= EXACT, (matrix, leaf)
    np.testing.assert_array_equal(block["mlp_norm"]["scale"], np.ones(config.hidden_size))
    head = R1.T @ np.diag(params["head"]["final_norm"]["scale"]) @ params["head"]["kernel"]
    assert relative_difference(head, np.asarray(new["head"]["kernel"])) <= EXACT
    embedding = params["embed"]["tokens"]["embedding"] @ R1
    assert relative_difference(embedding, np.asarray(new["embed"]["tokens"]["embedding"])) <= EXACT


@pytest.mark.parametrize(
    ("name", "options", "rotation"),
    [
        ("llama, untied", {}, None),
        ("llama, tied", {}, Rotation(seed=0, residual=True)),
        ("qwen2, tied", {"residual": False}, None),
        ("mixtral, untied", {"down": True, "seed": 4}, Rotation(seed=4, down=True)),
        ("gemma2, tied", {"residual": False, "heads": True}, Rotation(seed=0, heads=True)),
        ("opt, untied", {}, Rotation(seed=0, residual=True)),
    ],
)
def test_the_config_says_what_is_rotated_online_and_nothing_else(name, options, rotation):
    config = TransformedSource(InMemory(*random_model(name)), "hadamard", options).config
    assert config.rotation == rotation
    expected = dataclasses.replace(config_of(name), rotation=rotation)
    if config_of(name).norm == "layernorm":
        expected = dataclasses.replace(expected, norm="rmsnorm", final_norm="layernorm", center_embeddings=True)
    assert config == expected


@pytest.mark.parametrize("name", ["llama, tied", "gpt2, tied"])
def test_tied_embeddings_norm_and_head_stay_as_they_are(name):
    _, params = random_model(name)
    _, new = rotated(name)
    for part in ("embed", "head"):
        jax.tree.map(np.testing.assert_array_equal, new[part], params[part])
    assert "kernel" not in new["head"]


def test_seeds_and_blocks_have_rotations_of_their_own():
    """`values` alone, of two blocks with the same weights: what each did to them is not the same."""
    config, params = random_model("llama, untied")
    params = params | {"block_1": params["block_0"]}
    o_proj = {}
    for seed in (0, 0, 1):
        _, new = exactly(config, params, "hadamard", residual=False, seed=seed)
        kernels = [np.asarray(new[block]["attention"]["o_proj"]["kernel"]) for block in ("block_0", "block_1")]
        assert relative_difference(*kernels) > 0.1
        o_proj.setdefault(seed, []).append(kernels[0])
    np.testing.assert_array_equal(*o_proj[0])
    assert relative_difference(o_proj[0][0], o_proj[1][0]) > 0.1


def test_fingerprints():
    """Of the same transform the same, streamed or in memory; of another seed, and of the original, others."""
    config, params = random_model("mixtral, tied")
    original = InMemory(config, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params))
    streamed = [TransformedSource(original, "hadamard", {"seed": seed}) for seed in (0, 0, 1)]
    digits = [fingerprint(source) for source in (original, *streamed)]
    assert digits[1] == digits[2] == fingerprint(InMemory(*transform(config, original.params(), "hadamard")))
    assert len(set(digits)) == 3


def test_online_rotations_are_part_of_the_fingerprint():
    config, params = random_model("llama, tied")
    one, other = (
        fingerprint(InMemory(dataclasses.replace(config, rotation=Rotation(seed=seed, down=True)), params))
        for seed in (0, 1)
    )
    assert one != other


# Running rotated models


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama, tied", "opt, untied", "qwen3_moe, untied"])
def test_steps_through_the_cache_equal_one_pass(name):
    config, params = rotated(name, **EVERYWHERE)
    model = Decoder(config)
    with jax.enable_x64(True):
        whole = model.apply({"params": params}, TOKENS)
        state = DecodeState.empty(config, batch=2, capacity=TOKENS.shape[1], dtype=jnp.float64)
        pieces = []
        for piece in np.split(TOKENS, [9, 10, 11], axis=1):
            piece, state = model.apply({"params": params}, piece, state, method="step")
            pieces.append(piece)
        assert relative_difference(np.asarray(whole), np.concatenate(pieces, axis=1)) <= EXACT


@pytest.mark.parametrize("name", ["llama, tied", "gpt2, tied"])
def test_prepared_parameters_give_the_same_logits(name):
    """Sums in float32 in another order, as of any model that is prepared."""
    config, params = random_model(name)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    model, params = lq.transform(Decoder(config), params, "hadamard", **EVERYWHERE)
    plan = lq.uniform_plan(model.config, lq.QuantSpec(bits=4, group_size=32))
    packed = lq.quantize(model, params, plan)
    want = np.asarray(model.apply({"params": packed}, TOKENS))
    got = np.asarray(model.apply({"params": lq.prepare(packed)}, TOKENS))
    assert relative_difference(want, got) <= 1e-5


def test_in_bfloat16_it_is_the_original_but_for_rounding():
    """Two online rotations of the stream add two roundings to the dozens of a pass: no more than twice the error."""
    config, params = random_model("llama, tied")
    new_config, new = rotated("llama, tied", **EVERYWHERE)
    exact = logits(config, params)
    models = [(config, params), (new_config, new)]
    errors = [relative_difference(exact, logits(*model, dtype=jnp.bfloat16)) for model in models]
    assert errors[1] <= 2 * errors[0]


# What they are for

OUTLIERS = [17, 100]  # of 256 channels of the stream


def outlier_model() -> tuple[Decoder, dict]:
    """Two channels of the residual stream thirty times as large as the others, and the weights that read them too."""
    config = llama_config(blocks=2, hidden=256, tied=False)
    leaves = flatten_dict(random_params(config, dtype=jnp.float32), sep="/")
    for path, leaf in leaves.items():
        matrix, _, kind = path.rpartition("/")
        matrix = matrix.partition("/")[2]
        if kind == "embedding" or matrix in WRITES:
            leaves[path] = leaf.at[:, jnp.array(OUTLIERS)].multiply(30.0)
        elif matrix in READS and kind == "kernel":
            leaves[path] = leaf.at[jnp.array(OUTLIERS)].multiply(30.0)
    return Decoder(config), unflatten_dict(leaves, sep="/")


def kurtosis(x: np.ndarray) -> float:
    """Mean fourth power over the square of the mean square: 3 of a Gaussian."""
    return float((x**4).mean() / (x**2).mean() ** 2)


def test_outliers_of_the_stream_are_spread():
    """Two of 256 channels hold all of the energy: a kurtosis near 3 * 128. Each then is the sum of two of one size."""
    model, params = outlier_model()
    new_model, new = lq.transform(model, params, "hadamard")
    for before, after in zip(stream_of(model.config, params), stream_of(new_model.config, new), strict=True):
        assert kurtosis(before) > 100
        assert kurtosis(after) < 4


def test_rounding_to_four_bits_errs_less_after_rotation():
    """Per output channel, the error of x W over x W itself, on each matrix's own inputs.

    The scale of a column is its largest weight: about 30 of the two outlying rows before. Afterwards every row holds
    30/16 of each of the two and 1 of its own, at most about 6. The squared error falls some (30/6)^2 = 25 fold; a
    tenfold fall is asked of every matrix that reads the stream.
    """
    model, params = outlier_model()
    new_model, new = lq.transform(model, params, "hadamard")
    spec = lq.QuantSpec(bits=4, group_size=None, scale_dtype="float32")
    errors = []
    for config, tree in ((model.config, params), (new_model.config, new)):
        inputs, block = inputs_of(config, tree), flatten_dict(tree["block_0"], sep="/")
        of = {}
        for matrix in [matrix for matrix in READS if f"{matrix}/kernel" in block]:
            x, kernel = inputs[matrix.rpartition("/")[2]], block[f"{matrix}/kernel"]
            quantized = np.asarray(quantize_matrix(kernel, None, spec, "rtn", RTNOptions()).dequantize(), np.float64)
            exact = x @ np.asarray(kernel, np.float64)
            of[matrix] = np.square(x @ quantized - exact).sum() / np.square(exact).sum()
        errors.append(of)
    assert len(errors[0]) == 5
    for matrix, error in errors[0].items():
        assert errors[1][matrix] < error / 10, matrix


# Refusals


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_a_stream_behind_norms_with_gains_is_refused_by_family(family):
    source = InMemory(config_of(family), {})  # and before a weight is looked at
    with pytest.raises(UserError, match=rf"^{family}: [^\n]* have gains, [^\n]*; write residual: false$"):
        TransformedSource(source, "hadamard")
    assert TransformedSource(source, "hadamard", {"residual": False}).config == source.config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": False, "values": False}, "hadamard: nothing to rotate; write residual, values, heads or down"),
        ({"seeds": 1}, "transform hadamard: unknown option 'seeds'; options: seed, residual, values, heads, down"),
        ({"seed": "one"}, "transform hadamard: option seed: 'one' is not a whole number"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        TransformedSource(InMemory(config_of("llama"), {}), "hadamard", options)


def test_a_model_that_is_rotated_online_is_not_rotated_again():
    config, params = rotated("llama, tied", seed=5)
    with pytest.raises(UserError, match="llama: rotated before, with seed 5; give the original model"):
        TransformedSource(InMemory(config, params), "hadamard")


def test_transforms_are_listed_with_the_channel_scalings():
    rows = {name: (summary, options) for name, summary, options in catalogue("transforms")}
    methods = {**dict(TRANSFORMS.items()), **dict(SCALINGS.items())}
    assert rows.keys() == methods.keys() >= {"fold_norms", "hadamard", "awq", "smoothquant"}
    assert rows["hadamard"][1] == "seed=0, residual=True, values=True, heads=False, down=False"
    assert all(methods[name].summary == summary != "" for name, (summary, _) in rows.items())
