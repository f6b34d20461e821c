"""The fingerprint: the same for the same model however it is stored, another for a change in any part."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from lq.models.fingerprint import fingerprint
from lq.models.loading import InMemory, open_checkpoint
from lq.models.source import sampled

pytestmark = pytest.mark.once

CASES = ["gemma3_text", "gpt2", "llama", "llama_linear", "mixtral", "phi3", "qwen3_moe"]


@pytest.mark.parametrize("case", CASES)
def test_files_shards_and_memory_agree(recorded, copy_of, shard, case):
    checkpoint = open_checkpoint(recorded / case)
    directory = copy_of(case)
    shard(directory, list(load_file(directory / "model.safetensors"))[::2])
    assert fingerprint(open_checkpoint(directory)) == fingerprint(checkpoint)
    assert fingerprint(InMemory(checkpoint.config, checkpoint.params())) == fingerprint(checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.mlp.down_proj.weight",  # of three blocks; the others are routed
        "model.layers.1.input_layernorm.weight",
        "model.layers.2.mlp.experts.3.up_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_change_of_any_tensor_is_noticed(recorded, copy_of, edit_weights, name):
    directory = copy_of("qwen3_moe")
    edit_weights(directory, lambda tensors: tensors | {name: tensors[name] * 1.01})
    assert fingerprint(open_checkpoint(directory)) != fingerprint(open_checkpoint(recorded / "qwen3_moe"))


@pytest.mark.parametrize("where", [(0, 0), (-1, -1)])
def test_the_first_and_the_last_weight_of_a_matrix_are_looked_at(recorded, copy_of, edit_weights, where):
    directory = copy_of("llama")

    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][where] += 1
        return tensors

    edit_weights(directory, change)
    assert fingerprint(open_checkpoint(directory)) != fingerprint(open_checkpoint(recorded / "llama"))


def test_the_same_numbers_in_another_dtype_are_another_model(recorded, copy_of, edit_weights):
    directory = copy_of("llama")
    edit_weights(directory, lambda tensors: {name: t.astype(np.float16) for name, t in tensors.items()})
    assert fingerprint(open_checkpoint(directory)) != fingerprint(open_checkpoint(recorded / "llama"))


@pytest.mark.parametrize(
    ("shape", "taken"), [((3000,), (3000,)), ((100, 4000), (16, 16)), ((5, 3, 40), (5, 3, 16)), ((1, 1), (1, 1))]
)
def test_how_much_is_looked_at(shape, taken):
    array = np.arange(np.prod(shape)).reshape(shape)
    sample = sampled(array)
    assert sample.shape == taken
    assert sample.flat[0] == array.flat[0]
    assert sample.flat[-1] == array.flat[-1]
