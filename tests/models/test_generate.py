"""Generation: what its arguments mean, and that batching changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from lq.errors import UserError
from lq.models.decoder import Decoder
from lq.models.generate import Sampling, _run, decode_continuation, generate, sample
from lq.models.loading import open_checkpoint
from lq.numerics.qtensor import QTensor
from lq.numerics.spec import QuantSpec

pytestmark = pytest.mark.once

PROMPTS = [[5, 17, 3, 88, 41, 2, 9], [60], [7, 7, 12]]


@pytest.fixture(params=["llama", "gpt2", "gemma3_text"])
def model(request, recorded):
    checkpoint = open_checkpoint(recorded / request.param)
    return Decoder(checkpoint.config), checkpoint.params()


@pytest.fixture
def llama(recorded):
    checkpoint = open_checkpoint(recorded / "llama")
    return Decoder(checkpoint.config), checkpoint.params()


def test_greedy_equals_repeated_full_passes(llama):
    decoder, params = llama
    forward = jax.jit(decoder.apply)
    texts = [list(prompt) for prompt in PROMPTS]
    for text in texts:
        for _ in range(6):
            padded = np.asarray([text + [0] * (16 - len(text))], np.int32)
            logits = forward({"params": params}, padded, np.arange(16)[None] < len(text))
            text.append(int(logits[0, len(text) - 1].argmax()))
    expected = [text[len(prompt) :] for text, prompt in zip(texts, PROMPTS, strict=True)]
    assert generate(decoder, params, PROMPTS, max_new_tokens=6) == expected


def test_batch_equals_one_by_one(model):
    together = generate(*model, PROMPTS, max_new_tokens=12)
    assert together == [generate(*model, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]


def test_prompts_longer_than_a_step_of_padding(llama):
    prompts = [list(range(1, 41)), list(range(50, 83))]
    together = generate(*llama, prompts, max_new_tokens=40)
    assert [len(row) for row in together] == [40, 40]
    assert together == [generate(*llama, [prompt], max_new_tokens=40)[0] for prompt in prompts]


def test_fewer_tokens_are_a_prefix_of_more(llama):
    few, many = (generate(*llama, PROMPTS, max_new_tokens=n) for n in (1, 9))
    assert few == [row[:1] for row in many]


def test_same_seed_draws_the_same(llama):
    draw = lambda seed: generate(*llama, PROMPTS, max_new_tokens=12, temperature=1.0, seed=seed)  # noqa: E731
    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_draws_of_a_row_do_not_depend_on_the_rows_after_it(llama):
    options = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9, "seed": 5}
    assert generate(*llama, PROMPTS, **options)[:2] == generate(*llama, PROMPTS[:2], **options)


def test_top_k_of_one_is_greedy(model):
    greedy = generate(*model, PROMPTS, max_new_tokens=12)
    assert generate(*model, PROMPTS, max_new_tokens=12, temperature=5.0, top_k=1) == greedy


def test_small_top_p_is_greedy(llama):
    greedy = generate(*llama, PROMPTS, max_new_tokens=12)
    assert generate(*llama, PROMPTS, max_new_tokens=12, temperature=1.0, top_p=1e-6) == greedy


def test_row_ends_with_its_own_stop_token(llama):
    free = generate(*llama, PROMPTS, max_new_tokens=20, stop_ids=())
    stop = free[0][4]
    ended = generate(*llama, PROMPTS, max_new_tokens=20, stop_ids=[stop])
    assert ended == [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert len(ended[0]) <= 5


def test_stop_tokens_default_to_those_of_the_config(copy_of, edit_config, llama):
    free = generate(*llama, PROMPTS, max_new_tokens=20)
    stop = free[0][4]
    directory = copy_of("llama")
    edit_config(directory, eos_token_id=stop)
    decoder = Decoder(open_checkpoint(directory).config)
    assert generate(decoder, llama[1], PROMPTS, max_new_tokens=20)[0] == free[0][: free[0].index(stop) + 1]
    assert generate(decoder, llama[1], PROMPTS, max_new_tokens=20, stop_ids=()) == free


def test_packed_parameters(llama):
    decoder, params = llama
    spec = QuantSpec(bits=8, group_size=None, symmetric=True, scale_dtype="float32")
    packed, dense = {}, {}
    for path, leaf in flatten_dict(params, sep="/").items():
        packed[path] = dense[path] = leaf
        if path.endswith("kernel"):
            scale = jnp.abs(leaf).max(0, keepdims=True) / 127
            packed[path] = QTensor.from_codes(jnp.round(leaf / scale) + spec.zero_point, scale, None, spec)
            dense[path] = packed[path].dequantize()
    ours, expected = (generate(decoder, unflatten_dict(p, sep="/"), PROMPTS, max_new_tokens=8) for p in (packed, dense))
    assert ours == expected


def test_low_precision_cache(llama):
    decoder, params = llama
    rows = generate(Decoder(decoder.config, dtype=jnp.bfloat16), params, PROMPTS, max_new_tokens=8)
    assert [len(row) for row in rows] == [8, 8, 8]


def test_no_prompts_no_rows(llama):
    assert generate(*llama, [], max_new_tokens=4) == []


def test_length_and_sampling_share_one_compilation(llama):
    generate(*llama, PROMPTS, max_new_tokens=4, temperature=0.7)
    compiled = _run._cache_size()
    longer = [prompt * 4 for prompt in PROMPTS]
    generate(*llama, longer, max_new_tokens=5, temperature=0.9, top_k=7, top_p=0.8, seed=2)
    assert _run._cache_size() == compiled


# Drawing one token

LOGITS = jnp.log(jnp.asarray([0.1, 0.4, 0.2, 0.3]))


def drawn(**options) -> set[int]:
    sampling = Sampling(**({"temperature": 1.0, "top_k": 4, "top_p": 1.0} | options))
    keys = jax.random.split(jax.random.key(0), 500)
    return set(np.asarray(jax.vmap(lambda key: sample(LOGITS, key, sampling))(keys)).tolist())


def test_top_k_draws_from_the_k_likeliest():
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_k=4) == {0, 1, 2, 3}


def test_top_p_draws_from_the_fewest_that_reach_it():
    assert drawn(top_p=0.39) == {1}
    assert drawn(top_p=0.41) == {1, 3}
    assert drawn(top_p=0.89) == {1, 2, 3}
    assert drawn(top_k=2, top_p=0.6) == {1, 3}  # of what top-k left, 4/7 is not enough


def test_frequencies_follow_the_temperature():
    sampling = Sampling(temperature=0.5, top_k=4, top_p=1.0)
    keys = jax.random.split(jax.random.key(1), 20_000)
    tokens = np.asarray(jax.vmap(lambda key: sample(LOGITS, key, sampling))(keys))
    squared = np.asarray([0.01, 0.16, 0.04, 0.09])
    np.testing.assert_allclose(np.bincount(tokens) / tokens.size, squared / squared.sum(), atol=0.015)


# From tokens back to text


def tokenizer_of(vocabulary, decoder):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_a_continuation_keeps_the_space_it_begins_with():
    from tokenizers import decoders

    tokenizer = tokenizer_of(["<s>", "</s>", "<unk>", "▁the", "▁cat", "s", "▁sat"], decoders.Metaspace())
    assert tokenizer.decode([4, 5]) == "cats", "this decoder drops a text's first space"
    assert decode_continuation(tokenizer, [0, 3], [4, 5, 6, 1]) == " cats sat"
    assert decode_continuation(tokenizer, [0, 3, 4], [5, 6]) == "s sat"
    assert decode_continuation(tokenizer, [0], [3, 4]) == "the cat"
    assert decode_continuation(tokenizer, [0, 3], [1]) == ""


def test_a_continuation_of_half_a_character_is_decoded_on_its_own():
    from tokenizers import decoders

    tokenizer = tokenizer_of(["<s>", "</s>", "<unk>", "a", "Ã", "©", "Ġb"], decoders.ByteLevel())
    assert tokenizer.decode([3, 4, 5]) == "aé"
    assert decode_continuation(tokenizer, [3], [4, 5, 6]) == "é b"
    assert decode_continuation(tokenizer, [3, 4], [5, 6]) == "\ufffd b"


# Mistakes


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        ([[1], []], {}, "prompt 1: empty"),
        ([[1, 97]], {}, "prompt 0: token 97 is outside the vocabulary of 97"),
        ([[-1]], {}, "prompt 0: token -1 is outside"),
        ([[1] * 100], {"max_new_tokens": 29}, "128 positions; write max_new_tokens 28 or less"),
        ([[1] * 128], {}, "128 positions; shorten the prompt"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: 0"),
        ([[1]], {"temperature": -1.0}, "temperature: -1.0"),
        ([[1]], {"temperature": float("nan")}, "temperature: nan"),
        ([[1]], {"top_k": 0}, "top_k: 0"),
        ([[1]], {"top_p": 0.0}, "top_p: 0.0"),
        ([[1]], {"top_p": 1.5}, "top_p: 1.5"),
    ],
)
def test_mistakes_are_named(llama, prompts, options, says):
    with pytest.raises(UserError) as caught:
        generate(*llama, prompts, **({"max_new_tokens": 4} | options))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_positions_can_be_used(llama):
    assert len(generate(*llama, [[1] * 100], max_new_tokens=28, stop_ids=())[0]) == 28
