"""Opening checkpoints: what is read when, and every way a checkpoint can be wrong, by its one-line message."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from lq.errors import UserError
from lq.models.decoder import abstract_params
from lq.models.loading import InMemory, load_tokenizer, open_checkpoint

BLOCK_1 = "model.layers.1."


def message(action, *args, **options) -> str:
    """The message of the UserError that `action` raises; one line."""
    with pytest.raises(UserError) as caught:
        action(*args, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


# What is read


@pytest.mark.parametrize("case", ["llama", "phi3", "gpt2", "opt", "mixtral", "qwen3_moe"])
def test_parameters_have_the_shapes_of_the_decoder(recorded, case):
    checkpoint = open_checkpoint(recorded / case)
    expected = jax.tree.map(lambda leaf: leaf.shape, abstract_params(checkpoint.config))
    assert jax.tree.map(lambda leaf: leaf.shape, checkpoint.params()) == expected


def test_parts_together_are_the_whole(recorded):
    checkpoint = open_checkpoint(recorded / "qwen2")
    parts = {"embed": checkpoint.embed(), "head": checkpoint.head()}
    parts |= {f"block_{i}": checkpoint.block(i) for i in range(checkpoint.config.num_blocks)}
    assert_equal(parts, checkpoint.params())


def test_memory_source_equals_checkpoint(recorded):
    checkpoint = open_checkpoint(recorded / "mixtral")
    source = InMemory(checkpoint.config, checkpoint.params())
    assert_equal(source.block(1, np.float16), checkpoint.block(1, np.float16))
    assert_equal(source.params(), checkpoint.params())


def test_block_outside_the_model_is_an_index_error(recorded):
    checkpoint = open_checkpoint(recorded / "llama")
    for index in (-1, 2):
        with pytest.raises(IndexError, match="2 blocks"):
            checkpoint.block(index)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_stored_dtype_is_kept_unless_another_is_asked_for(copy_of, edit_weights, dtype):
    directory = copy_of("llama")
    edit_weights(directory, lambda tensors: {name: t.astype(dtype) for name, t in tensors.items()})
    checkpoint = open_checkpoint(directory)
    assert {leaf.dtype for leaf in jax.tree.leaves(checkpoint.params())} == {np.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(checkpoint.block(0, np.float32))} == {np.dtype(np.float32)}


def test_shards_equal_single_file(recorded, copy_of, shard):
    directory = copy_of("llama")
    shard(directory, [name for name in load_file(directory / "model.safetensors") if "mlp" in name or BLOCK_1 in name])
    assert_equal(open_checkpoint(directory).params(), open_checkpoint(recorded / "llama").params())


def test_block_is_read_without_the_files_of_other_blocks(recorded, copy_of, shard):
    directory = copy_of("llama")
    names = [name for name in load_file(directory / "model.safetensors") if BLOCK_1 in name]
    _, second = shard(directory, names)
    checkpoint = open_checkpoint(directory)
    second.unlink()
    assert_equal(checkpoint.block(0), open_checkpoint(recorded / "llama").block(0))
    assert second.name in message(checkpoint.block, 1)


def test_block_is_read_without_the_tensors_of_other_parts(recorded, copy_of, edit_weights):
    directory = copy_of("llama")

    def spoil_all_but_block_1(tensors):
        return {name: t if BLOCK_1 in name else np.full_like(t, np.nan) for name, t in tensors.items()}

    edit_weights(directory, spoil_all_but_block_1)
    checkpoint = open_checkpoint(directory)
    assert_equal(checkpoint.block(1), open_checkpoint(recorded / "llama").block(1))
    for other in (checkpoint.embed, checkpoint.head):
        assert "NaN" in message(other)


def test_leaves_are_placed_by_the_given_function(recorded):
    seen = {}

    def place(path, array):
        seen[path] = array.shape
        return jax.device_put(array)

    open_checkpoint(recorded / "mixtral", place=place).block(0)
    assert seen["block_0/moe/gate_proj/kernel"] == (4, 32, 40)
    assert all(path.startswith("block_0/") for path in seen)


# Wrong directories and configs


def test_directory_without_config(tmp_path):
    assert "no config.json" in message(open_checkpoint, tmp_path)


def test_path_that_does_not_exist(tmp_path):
    assert "no such directory" in message(open_checkpoint, tmp_path / "nothing")


def test_invalid_json_names_file_and_place(copy_of):
    directory = copy_of("llama")
    (directory / "config.json").write_text('{"model_type": "llama",\n oops}')
    text = message(open_checkpoint, directory)
    assert "config.json: not valid JSON" in text
    assert "line 2" in text


def test_json_that_is_no_object(copy_of):
    directory = copy_of("llama")
    (directory / "config.json").write_text("[]")
    assert "config.json: not a JSON object" in message(open_checkpoint, directory)


def test_config_that_is_a_directory(copy_of):
    directory = copy_of("llama")
    (directory / "config.json").unlink()
    (directory / "config.json").mkdir()
    assert "config.json: cannot be read" in message(open_checkpoint, directory)


@pytest.mark.parametrize(
    ("case", "changes", "says"),
    [
        ("llama", {"model_type": "bloom"}, ["model_type 'bloom'", "gemma2", "qwen3_moe"]),
        ("llama", {"model_type": ["llama"]}, ["model_type ['llama'] is not supported"]),
        ("llama", {"hidden_act": "quick_gelu"}, ["hidden_act: 'quick_gelu'"]),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
        ("llama", {"attention_bias": "wide"}, ["attention_bias"]),  # refused by transformers
        ("llama", {"hidden_size": "wide"}, ["hidden_size: 'wide'; write a whole number from 1"]),
        ("llama", {"hidden_size": 0}, ["hidden_size: 0; write a whole number from 1"]),
        ("llama", {"hidden_size": -32}, ["hidden_size: -32;"]),
        ("llama", {"num_attention_heads": 0}, ["num_attention_heads: 0;"]),
        ("llama", {"num_key_value_heads": 3}, ["num_key_value_heads: 3 does not divide num_attention_heads 4"]),
        ("llama", {"num_key_value_heads": 0}, ["num_key_value_heads: 0; write a whole number from 1 or null"]),
        ("llama", {"num_hidden_layers": True}, ["num_hidden_layers: True;"]),
        ("llama", {"max_position_embeddings": 0}, ["max_position_embeddings: 0;"]),
        ("llama", {"vocab_size": 0}, ["vocab_size: 0;"]),
        ("llama", {"rms_norm_eps": -1e-5}, ["rms_norm_eps: -1e-05; write a number above 0"]),
        ("llama", {"rms_norm_eps": "1e-5"}, ["rms_norm_eps: '1e-5';"]),
        ("llama", {"rms_norm_eps": float("nan")}, ["rms_norm_eps: nan;"]),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "4"}}, ["rope_parameters.factor: '4';"]),
        ("llama", {"eos_token_id": -1}, ["eos_token_id: -1; write a token id, a list of them, or null"]),
        ("gpt2", {"n_embd": 0}, ["n_embd: 0;"]),
        ("gpt2", {"n_head": 3}, ["n_head: 3 does not divide n_embd 32"]),
        ("gemma2", {"query_pre_attn_scalar": 0}, ["query_pre_attn_scalar: 0;"]),
        ("gemma2", {"sliding_window": -1}, ["sliding_window: -1;"]),
        ("phi3", {"original_max_position_embeddings": 0}, ["original_max_position_embeddings: 0;"]),
        ("mixtral", {"num_experts_per_tok": 5}, ["num_experts_per_tok: 5 of 4 experts; write 4 or less"]),
    ],
)
def test_config_that_is_refused_by_file_and_key(copy_of, edit_config, case, changes, says):
    directory = copy_of(case)
    edit_config(directory, **changes)
    text = message(open_checkpoint, directory)
    assert text.startswith(f"{directory / 'config.json'}: ")
    for words in says:
        assert words in text


@pytest.mark.parametrize("name", ["lq.json", "shards.json"])
def test_checkpoint_that_lq_quantized_is_not_an_original(copy_of, name):
    directory = copy_of("llama")
    (directory / name).write_text("{}")
    assert message(open_checkpoint, directory) == f"{directory}: already quantized by lq; give the original model"


def test_generation_config_adds_stop_tokens(copy_of, edit_config):
    directory = copy_of("llama")
    edit_config(directory, eos_token_id=3)
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 3]}')
    assert open_checkpoint(directory).config.eos_token_ids == (3, 5)


@pytest.mark.parametrize("value", ["</s>", -2, [5, -1], [5, "</s>"], 2.0, True, {"id": 5}])
def test_generation_config_with_a_wrong_stop_token(copy_of, value):
    directory = copy_of("llama")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert f"generation_config.json: eos_token_id: {value!r}; write a token id" in message(open_checkpoint, directory)


def test_code_of_a_checkpoint_is_not_run(copy_of, edit_config, tmp_path):
    directory = copy_of("llama")
    marker = tmp_path / "code_was_run"
    (directory / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    edit_config(directory, auto_map={"AutoConfig": "evil.Evil"})
    open_checkpoint(directory)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    message(load_tokenizer, directory)
    assert not marker.exists()


# Wrong weights


def test_directory_without_weights(copy_of):
    directory = copy_of("llama")
    (directory / "model.safetensors").unlink()
    text = message(open_checkpoint, directory)
    assert "model.safetensors" in text
    assert "model.safetensors.index.json" in text


def test_pickle_is_refused_with_the_conversion_command(copy_of):
    directory = copy_of("llama")
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"never opened")
    text = message(open_checkpoint, directory)
    assert "pytorch_model.bin" in text
    assert 'python -c "from transformers import' in text
    assert f"from_pretrained('{directory}').save_pretrained('{directory}')" in text


def test_corrupt_header(copy_of):
    directory = copy_of("llama")
    (directory / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")
    text = message(open_checkpoint, directory)
    assert "model.safetensors: damaged or incomplete" in text


@pytest.mark.parametrize("kept", [0, 5, 100, -7])
def test_truncated_file(copy_of, kept):
    directory = copy_of("llama")
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "model.safetensors: damaged or incomplete" in message(open_checkpoint, directory)


def test_truncated_shard_is_named(copy_of, shard):
    directory = copy_of("llama")
    _, second = shard(directory, ["model.norm.weight"])
    second.write_bytes(second.read_bytes()[:-1])
    assert f"{second.name}: damaged or incomplete" in message(open_checkpoint, directory)


def test_absent_shard_is_named(copy_of, shard):
    directory = copy_of("llama")
    _, second = shard(directory, ["model.norm.weight"])
    second.unlink()
    text = message(open_checkpoint, directory)
    assert f"model.safetensors.index.json: names {second.name}" in text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "no weight_map"),
        ('{"weight_map": ["model.safetensors"]}', "no weight_map"),
        ('{"weight_map": "model.safetensors"}', "no weight_map"),
        ("[]", "not a JSON object"),
        ('{"weight_map": {"a": 3}}', "weight_map: a: 3 is not the name of a file beside it"),
        ('{"weight_map": {"a": null, "b": "x"}}', "weight_map: a: None is not the name"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "weight_map: a: '../model.safetensors' is not the name"),
        ('{"weight_map": {"a": "/model.safetensors"}}', "weight_map: a: '/model.safetensors' is not the name"),
        ('{"weight_map": {"a": ".."}}', "names ..,"),
    ],
)
def test_damaged_index(copy_of, shard, text, says):
    directory = copy_of("llama")
    shard(directory, [])
    (directory / "model.safetensors.index.json").write_text(text)
    assert f"index.json: {says}" in message(open_checkpoint, directory)


def test_shards_without_their_index(copy_of, shard):
    directory = copy_of("llama")
    shard(directory, [])
    (directory / "model.safetensors.index.json").unlink()
    assert "model.safetensors.index.json" in message(open_checkpoint, directory)


def test_missing_tensor(copy_of, edit_weights):
    directory = copy_of("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(directory, lambda tensors: {n: t for n, t in tensors.items() if n != name})
    assert f"tensor {name} is missing" in message(open_checkpoint, directory)


def test_missing_tensors_are_counted(copy_of, edit_config):
    directory = copy_of("llama")
    edit_config(directory, num_hidden_layers=3)
    assert "tensor model.layers.2.input_layernorm.weight (and 15 more) is missing" in message(
        open_checkpoint, directory
    )


def test_extra_tensor(copy_of, edit_weights):
    directory = copy_of("llama")
    edit_weights(directory, lambda tensors: tensors | {"model.layers.0.adapter.weight": np.ones(3, np.float32)})
    text = message(open_checkpoint, directory)
    assert "tensor model.layers.0.adapter.weight is not part of a llama model" in text
    assert "model.safetensors" in text


def test_tensor_under_two_spellings(copy_of, edit_weights):
    directory = copy_of("llama")
    edit_weights(directory, lambda tensors: tensors | {"norm.weight": tensors["model.norm.weight"]})
    text = message(open_checkpoint, directory)
    assert "tensor norm.weight is also model.norm.weight" in text or "model.norm.weight is also norm.weight" in text


def test_wrong_shape_tells_both(copy_of, edit_weights):
    directory = copy_of("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(directory, lambda tensors: tensors | {name: tensors[name].T.copy()})
    text = message(open_checkpoint, directory)
    assert f"tensor {name} has shape [32, 40]; config.json asks for [40, 32]" in text


@pytest.mark.parametrize(("dtype", "written"), [(np.int8, "I8"), (ml_dtypes.float8_e4m3fn, "F8_E4M3"), (float, "F64")])
def test_unreadable_dtype(copy_of, edit_weights, dtype, written):
    directory = copy_of("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(directory, lambda tensors: tensors | {name: tensors[name].astype(dtype)})
    assert f"tensor {name} is {written}; lq reads BF16, F16, F32" in message(open_checkpoint, directory)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_weight_that_is_not_finite(copy_of, edit_weights, value, dtype):
    directory = copy_of("llama")
    name = "model.layers.1.mlp.down_proj.weight"

    def spoil(tensors):
        tensors = {n: t.astype(dtype) for n, t in tensors.items()}
        tensors[name][3, 5] = value
        return tensors

    edit_weights(directory, spoil)
    checkpoint = open_checkpoint(directory)
    checkpoint.block(0)
    assert f"tensor {name} holds NaN or infinite values" in message(checkpoint.block, 1)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_largest_finite_weights_are_accepted(copy_of, edit_weights, dtype):
    directory = copy_of("llama")
    largest = ml_dtypes.finfo(dtype).max

    def fill(tensors):
        return {
            n: np.full(t.shape, -largest if n.endswith("norm.weight") else largest, dtype) for n, t in tensors.items()
        }

    edit_weights(directory, fill)
    assert float(abs(open_checkpoint(directory).block(0)["mlp"]["up_proj"]["kernel"]).max()) == float(largest)


# The hub and the tokenizer


def test_hub_name_without_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = message(open_checkpoint, "nobody/no-such-model")
    assert "nobody/no-such-model: neither a directory nor a model the hub gave" in text


def test_malformed_hub_name():
    assert "--oops" in message(open_checkpoint, "--oops--")


def test_hub_name_asks_for_safetensors_and_text_files_only(recorded, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(recorded / "llama")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert open_checkpoint("somebody/model").config.family == "llama"
    assert asked["name"] == "somebody/model"
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in asked["allow_patterns"])


def test_hub_model_with_pickles_only(copy_of, monkeypatch):
    directory = copy_of("llama")
    (directory / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(directory))
    text = message(open_checkpoint, "somebody/model")
    assert "somebody/model: the hub has no safetensors weights" in text
    assert "from_pretrained('somebody/model').save_pretrained('model')" in text


def test_tokenizer_of_a_directory(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("b a c")["input_ids"] == [1, 0, 2]


def test_missing_tokenizer(recorded):
    text = message(load_tokenizer, recorded / "llama")
    assert "no tokenizer" in text
    assert "tokenizer.json" in text


def test_broken_tokenizer(copy_of):
    directory = copy_of("llama")
    (directory / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    assert "the tokenizer cannot be read" in message(load_tokenizer, directory)
