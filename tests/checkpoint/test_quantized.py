"""A quantized checkpoint: exact in bytes, whole or not at all, resumable, and suspicious of what it reads."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from lq.allocation import allocate
from lq.allocation.allocate import Pin
from lq.checkpoint import open_quantized, write_quantized
from lq.checkpoint.quantized import measured_bits_per_weight
from lq.errors import UserError
from lq.importance import score
from lq.models.decoder import Decoder
from lq.models.loading import open_checkpoint
from lq.numerics.qtensor import QTensor
from lq.quantizers import QUANTIZERS, PlannedSource

OPTIONS = QUANTIZERS.options("rtn", {})
RECORD = {"method": "rtn", "options": {}}


def plan_for(source, seed=0, **kwargs):
    budget = {"bpw": 2.85, "bits": (2, 3, 4), **kwargs}
    return allocate(score(source, "random", options={"seed": seed}), **budget)


def write(source, plan, out, **kwargs):
    planned = PlannedSource(source, plan.specs, "rtn", OPTIONS)
    write_quantized(planned, plan, out, quantizer=RECORD, description=source.path, **kwargs)


@pytest.fixture(scope="module")
def source(small_model):
    return open_checkpoint(small_model.path)


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "q"
    plan = plan_for(source)
    write(source, plan, out)
    return out, plan


@pytest.fixture
def copy(written, tmp_path):
    shutil.copytree(written[0], tmp_path / "q")
    return tmp_path / "q"


def test_measured_bits_equal_the_plan_to_the_bit(written):
    out, plan = written
    checkpoint = open_quantized(out)
    assert measured_bits_per_weight(checkpoint) == plan.bpw == checkpoint.plan.bpw
    assert plan.bpw <= 2.85


def test_size_on_disk_is_the_plan_and_headers(written):
    out, plan = written
    size = sum(file.stat().st_size for file in out.iterdir() if not file.name.startswith("tokenizer"))
    assert plan.nbytes < size <= plan.nbytes + 64_000


def test_size_on_the_device_is_the_plan(written):
    out, plan = written
    leaves = jax.tree.leaves(open_quantized(out).params())
    assert sum(leaf.on_device_size_in_bytes() for leaf in leaves) == plan.nbytes


def test_reads_back_what_was_packed(source, written):
    out, plan = written
    packed = PlannedSource(source, plan.specs, "rtn", OPTIONS).params()
    read = open_quantized(out).params()
    assert jax.tree.structure(packed) == jax.tree.structure(read)
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(read), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_packed_logits_equal_the_dequantized_models(written):
    import jax.numpy as jnp

    checkpoint = open_quantized(written[0])
    params = checkpoint.params(jnp.float32)

    def dequantized(leaf):
        return leaf.dequantize() if isinstance(leaf, QTensor) else leaf

    dense = jax.tree.map(dequantized, params, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    tokens = np.random.default_rng(0).integers(1, 4096, (2, 40))
    model = Decoder(checkpoint.config)
    packed_logits, dense_logits = (np.asarray(model.apply({"params": p}, tokens)) for p in (params, dense))
    assert np.abs(packed_logits - dense_logits).max() <= 1e-5 * np.abs(dense_logits).max()


@pytest.mark.parametrize(
    "budget",
    [
        {"embedding_bits": 4, "bpw": 3.0},
        {"bpw": 3.5, "count": "all", "embedding_bits": 3},
        {"bpw": 6.0, "pins": [Pin(pattern="v_proj", bits=16)], "bits": (2, 8)},
    ],
    ids=["embedding", "all", "pinned"],
)
def test_other_plans_measure_what_they_say(source, tmp_path, budget):
    plan = plan_for(source, **budget)
    write(source, plan, tmp_path / "q")
    checkpoint = open_quantized(tmp_path / "q")
    assert measured_bits_per_weight(checkpoint) == plan.bpw
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(checkpoint.params())) == plan.nbytes


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("kill_after", ["embed", "block_0", "block_2", "head"])
def test_an_interrupted_write_resumes_to_the_same_bytes(source, written, tmp_path, kill_after):
    out, plan = tmp_path / "q", written[1]

    def killed(part):
        if part == kill_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(source, plan, out, on_part=killed)
    with pytest.raises(UserError, match="quantization was interrupted; run the same `lq quantize` again with --resume"):
        open_quantized(out)
    with pytest.raises(UserError, match="add --resume"):
        write(source, plan, out)
    with pytest.raises(UserError, match="an interrupted write of another plan or model"):
        write(source, plan_for(source, seed=5), out, resume=True)
    made = []
    before = {f.name: f.stat().st_mtime_ns for f in out.glob("*.safetensors")}
    write(source, plan, out, resume=True, on_part=made.append)
    assert contents(out) == contents(written[0])
    kept = [name for name, time in before.items() if (out / name).stat().st_mtime_ns == time]
    assert kept == list(before), "finished shards are not written again"


@pytest.fixture
def interrupted(source, written, tmp_path):
    """A write of the plan of `written` that was killed after block_1."""

    def killed(part):
        if part == "block_1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(source, written[1], tmp_path / "q", on_part=killed)
    return tmp_path / "q"


def test_a_shard_damaged_between_writes_is_written_again(source, written, interrupted):
    out, plan = interrupted, written[1]
    shard = out / "block_0.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x00")
    write(source, plan, out, resume=True)
    assert contents(out) == contents(written[0])


LEFTOVERS = [".embed.safetensors.abc", ".lq.json.abc", ".shards.json.abc", ".tokenizer.json.abc"]


def test_what_a_killed_process_left_is_removed_once_it_is_known_to_be_ours(source, written, interrupted):
    for name in LEFTOVERS:
        (interrupted / name).write_text("half")
    before = contents(interrupted)
    for options in ({"plan": plan_for(source, seed=5), "resume": True}, {"plan": written[1]}):
        with pytest.raises(UserError, match="an interrupted write of"):
            write(source, out=interrupted, **options)
        assert contents(interrupted) == before, "a refusal changes nothing"
    write(source, written[1], interrupted, resume=True)
    assert contents(interrupted) == contents(written[0])


def test_a_write_killed_before_its_first_record_is_resumed(source, written, tmp_path):
    out = tmp_path / "q"
    out.mkdir()
    (out / ".shards.json.abc").write_text("{")
    with pytest.raises(UserError, match="interrupted as it began; add --resume"):
        write(source, written[1], out)
    write(source, written[1], out, resume=True)
    assert contents(out) == contents(written[0])


def test_a_write_killed_after_the_manifest_is_finished(source, written, interrupted):
    record = (interrupted / "shards.json").read_bytes()
    write(source, written[1], interrupted, resume=True)
    (interrupted / "shards.json").write_bytes(record)
    write(source, written[1], interrupted, resume=True)
    assert contents(interrupted) == contents(written[0])


@pytest.mark.parametrize("shards", [3, None, [], {"embed": 3}, {"embed": {"bytes": 1}}])
def test_a_damaged_record_of_an_interrupted_write_is_one_line(source, written, interrupted, shards):
    record = json.loads((interrupted / "shards.json").read_text())
    (interrupted / "shards.json").write_text(json.dumps({**record, "shards": shards}))
    with pytest.raises(UserError, match=r"^[^\n]*shards\.json: damaged; remove [^\n]*$"):
        write(source, written[1], interrupted, resume=True)


def test_a_matrix_that_has_not_the_planned_size_is_a_defect(source, written, tmp_path):
    plan = written[1]
    path, spec = next(iter(plan.specs.items()))
    other = PlannedSource(source, plan.specs | {path: dataclasses.replace(spec, bits=8)}, "rtn", OPTIONS)
    with pytest.raises(RuntimeError, match=f"{path}: .* in the plan it was to be packed by"):
        write_quantized(other, plan, tmp_path / "q", quantizer=RECORD, description=source.path)
    assert not (tmp_path / "q" / "lq.json").exists()


def test_a_quantized_checkpoint_is_no_original(written):
    with pytest.raises(UserError, match="already quantized by lq; give the original model"):
        open_checkpoint(written[0])


def test_nothing_is_overwritten(source, written, tmp_path):
    with pytest.raises(UserError, match="already holds a finished checkpoint"):
        write(source, written[1], written[0])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty, and no checkpoint of lq"):
        write(source, written[1], tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


def damage_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_is_found_when_the_part_is_read(copy):
    damage_bit(copy / "block_1.safetensors")
    checkpoint = open_quantized(copy)
    checkpoint.block(0)
    with pytest.raises(UserError, match=r"block_1.safetensors: checksum does not match lq.json"):
        checkpoint.block(1)


def test_damage_is_found_when_opening(copy):
    shard = copy / "block_1.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"block_1.safetensors: \d+ bytes, lq.json says \d+"):
        open_quantized(copy)
    shard.write_bytes(b"\xff" * 8 + whole[8:])
    with pytest.raises(UserError, match=r"block_1\.safetensors: damaged"):
        open_quantized(copy)
    shard.unlink()
    with pytest.raises(UserError, match=r"block_1\.safetensors: missing"):
        open_quantized(copy)


def test_a_shard_of_another_plan_is_refused(source, copy, tmp_path):
    write(source, plan_for(source, bpw=4.1, bits=(2, 4)), tmp_path / "other")
    manifest = json.loads((copy / "lq.json").read_text())
    other = json.loads((tmp_path / "other" / "lq.json").read_text())
    part = next(p for p in manifest["shards"] if manifest["shards"][p]["bytes"] != other["shards"][p]["bytes"])
    shutil.copyfile(tmp_path / "other" / f"{part}.safetensors", copy / f"{part}.safetensors")
    manifest["shards"][part] = other["shards"][part]
    (copy / "lq.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"does not fit the plan in lq\.json"):
        open_quantized(copy)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"format": 1}', b"[]", b"3", b"\xff\xfe"])
def test_a_damaged_manifest_is_one_line(copy, data):
    (copy / "lq.json").write_bytes(data)
    with pytest.raises(UserError, match=r"lq\.json: damaged"):
        open_quantized(copy)


MATRIX = "block_0/attention/q_proj"
WRONG_ENTRIES = {
    "shards": [3, None, [], {"embed": 3}, {"embed": {"bytes": "1", "sha256": "x"}}, {"embed": {"bytes": 1}}],
    "quantizer": [3],
    "plan": [3, None, [], {}],
    "plan specs": [3, [3], [{}], [{"bits": 9}], [{"bits": 3.0}], [{"bits": True}], [{"bits": "3"}], []],
    "plan specs 0 group_size": [7, 64.0, "64", [64]],
    "plan specs 0 symmetric": [3, "no"],
    "plan specs 0 scale_dtype": ["int8", 3, ["bfloat16"]],
    "plan specs 0 format": ["float", 3],
    "plan matrices": [3, [], {"x": 3}],
    f"plan matrices {MATRIX}": [3, [0], [0, 3], [0, [1], 2], [99, [64, 64]], ["a", [64, 64]]],
}


def replace(tree, keys, value):
    """The JSON `tree` with what `keys` lead to replaced."""
    at = tree
    for key in keys[:-1]:
        at = at[int(key) if isinstance(at, list) else key]
    at[int(keys[-1]) if isinstance(at, list) else keys[-1]] = value
    return tree


@pytest.mark.parametrize(("where", "value"), [(w, v) for w, values in WRONG_ENTRIES.items() for v in values])
def test_a_wrong_entry_in_the_manifest_is_one_line(copy, where, value):
    manifest = json.loads((copy / "lq.json").read_text())
    (copy / "lq.json").write_text(json.dumps(replace(manifest, where.split(), value)))
    with pytest.raises(UserError, match=r"^[^\n]*lq\.json: damaged [^\n]*; quantize again$"):
        open_quantized(copy)


def test_a_later_format_is_refused(copy):
    manifest = json.loads((copy / "lq.json").read_text())
    (copy / "lq.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(UserError, match="format 99, this lq reads 1"):
        open_quantized(copy)


def test_a_config_of_another_model_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(UserError, match=r"config\.json: of another model than lq\.json"):
        open_quantized(copy)
