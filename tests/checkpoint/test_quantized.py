"""A quantized checkpoint: exact in bytes, whole or not at all, resumable, and suspicious of what it reads."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from small_models import llama_config

from lq.allocation import allocate, uniform_plan
from lq.allocation.pins import Pin
from lq.checkpoint import check_output, open_quantized, write_quantized
from lq.checkpoint.layout import leaf_bytes
from lq.checkpoint.quantized import measured_bits_per_weight
from lq.errors import UserError
from lq.importance import score
from lq.lock import held
from lq.models.decoder import Decoder
from lq.models.loading import open_checkpoint
from lq.models.source import InMemory
from lq.numerics.qtensor import QTensor
from lq.numerics.spec import QuantSpec
from lq.quantizers import PlannedSource, Recipe
from lq.sealed import sealed, unsealed

RECIPE = Recipe()
RECORD = {"method": "rtn", "options": {}}


def plan_for(source, seed=0, **kwargs):
    budget = {"bpw": 2.85, "bits": (2, 3, 4), **kwargs}
    return allocate(score(source, "random", options={"seed": seed}), **budget)


def write(source, plan, out, **kwargs):
    planned = PlannedSource(source, plan.specs, RECIPE)
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
    packed = PlannedSource(source, plan.specs, RECIPE).params()
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
    with pytest.raises(UserError, match=r"an interrupted write of another plan; give another --out or remove it$"):
        write(source, plan_for(source, seed=5), out, resume=True)
    made, kept = [], []
    before = {f.name: f.stat().st_mtime_ns for f in out.glob("*.safetensors")}
    write(source, plan, out, resume=True, on_part=made.append, on_kept=kept.append)
    assert kept[-1] == kill_after
    assert [*kept, *made] == ["embed", *(f"block_{i}" for i in range(source.config.num_blocks)), "head"]
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


def test_what_differs_from_the_interrupted_write_is_named(source, written, interrupted):
    before = contents(interrupted)
    packed = PlannedSource(source, written[1].specs, RECIPE)
    other = {**RECORD, "options": {"clip": "none"}}
    with pytest.raises(UserError, match=r"another quantizer\.options\.clip \(nothing there, none here\); give"):
        write_quantized(packed, written[1], interrupted, quantizer=other, description=source.path, resume=True)
    assert contents(interrupted) == before


def test_a_shard_damaged_between_writes_is_written_again(source, written, interrupted):
    out, plan = interrupted, written[1]
    shard = out / "block_0.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x00")
    write(source, plan, out, resume=True)
    assert contents(out) == contents(written[0])


LEFTOVERS = [
    f".{name}.abc"
    for name in ("embed.safetensors", "states-2.safetensors", *("lq.json", "shards.json", "tokenizer.json"))
]


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
    record = unsealed(json.loads((interrupted / "shards.json").read_text()))
    (interrupted / "shards.json").write_text(json.dumps({**record, "shards": shards}))
    with pytest.raises(UserError, match=r"^[^\n]*shards\.json: damaged; remove [^\n]*$"):
        write(source, written[1], interrupted, resume=True)


def write_params(source, params, plan, out, **kwargs):
    """Writes parameters in memory, packed here, as a checkpoint of `source`."""
    packed = PlannedSource(InMemory(source.config, params), plan.specs, RECIPE)
    write_quantized(packed, plan, out, quantizer=RECORD, description=source.path, **kwargs)


def with_weight(source, path, value):
    """The parameters of `source` with one element of a leaf replaced."""
    leaves = flatten_dict(source.params(), sep="/")
    leaves[path] = leaves[path].at[0, 0].set(value)
    return unflatten_dict(leaves, sep="/")


def test_a_refused_write_leaves_nothing(source, written, tmp_path):
    damaged = with_weight(source, "block_1/mlp/up_proj/kernel", np.nan)
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new" / "deep" / "q"):
        with pytest.raises(UserError, match="block_1/mlp/up_proj: a weight is NaN"):
            write_params(source, damaged, written[1], out)
    assert [file.name for file in tmp_path.rglob("*")] == ["empty"], "and the empty directory is left as it was"
    write(source, written[1], tmp_path / "empty")
    assert contents(tmp_path / "empty") == contents(written[0])


def test_a_refused_float16_scale_leaves_nothing(source, tmp_path):
    plan = plan_for(source, spec=QuantSpec(bits=4, scale_dtype="float16"))
    with pytest.raises(UserError, match="block_1/mlp/up_proj: weights too large for float16 scales"):
        write_params(source, with_weight(source, "block_1/mlp/up_proj/kernel", 3e7), plan, tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_a_refused_write_leaves_what_others_put_there(source, written, tmp_path):
    damaged = with_weight(source, "block_1/mlp/up_proj/kernel", np.nan)
    with pytest.raises(UserError, match="a weight is NaN"):
        write_params(
            source, damaged, written[1], tmp_path / "q", on_part=lambda _: (tmp_path / "q" / "notes").write_text("mine")
        )
    assert contents(tmp_path / "q") == {"notes": b"mine"}


def test_a_refused_resumption_keeps_the_earlier_shards(source, written, tmp_path):
    def killed(part):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(source, written[1], tmp_path / "q", on_part=killed)
    before, made = contents(tmp_path / "q"), []
    assert set(before) == {"embed.safetensors", "shards.json"}
    damaged = with_weight(source, "block_1/mlp/up_proj/kernel", np.nan)
    with pytest.raises(UserError, match="a weight is NaN"):
        write_params(source, damaged, written[1], tmp_path / "q", resume=True, on_part=made.append)
    assert made == ["block_0"]
    assert contents(tmp_path / "q") == before
    write(source, written[1], tmp_path / "q", resume=True)
    assert contents(tmp_path / "q") == contents(written[0])


def test_a_matrix_that_has_not_the_planned_size_is_refused(source, written, tmp_path):
    plan = written[1]
    path, spec = next(iter(plan.specs.items()))
    other = PlannedSource(source, plan.specs | {path: dataclasses.replace(spec, bits=8)}, RECIPE)
    with pytest.raises(UserError, match=f"^{path}/kernel: [0-9]+ bytes, [0-9]+ in the plan[^\n]*$"):
        write_quantized(other, plan, tmp_path / "q", quantizer=RECORD, description=source.path)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("leaf", ["embed/tokens/embedding", "block_1/mlp_norm/scale"])
def test_a_dense_leaf_of_more_than_16_bits_is_refused_by_name(source, written, tmp_path, leaf):
    leaves = flatten_dict(PlannedSource(source, written[1].specs, RECIPE).params(), sep="/")
    leaves[leaf] = leaves[leaf].astype("float32")
    params = InMemory(source.config, unflatten_dict(leaves, sep="/"))
    size = 2 * leaves[leaf].size
    with pytest.raises(
        UserError, match=rf"^{leaf}: {2 * size} bytes, {size} in the plan, where what stays dense has 16"
    ):
        write_quantized(params, written[1], tmp_path / "q", quantizer=RECORD, description=source.path)
    assert not (tmp_path / "q").exists()


def test_the_leaves_on_disk_are_the_plan(written):
    out, plan = written
    assert sum(sum(leaf_bytes(shard).values()) for shard in out.glob("*.safetensors")) == plan.nbytes


def test_a_description_of_another_model_is_refused(source, written, tmp_path):
    shutil.copytree(source.path, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    packed = PlannedSource(source, written[1].specs, RECIPE)
    with pytest.raises(
        UserError, match=r"other/config\.json: of another model than the weights \(they differ in norm_eps\)"
    ):
        write_quantized(packed, written[1], tmp_path / "q", quantizer=RECORD, description=tmp_path / "other")
    assert not (tmp_path / "q").exists()


def test_a_plan_of_another_model_is_refused(source, written, tmp_path):
    for other in (uniform_plan(llama_config(2), QuantSpec(bits=3)), dataclasses.replace(written[1], other_weights=1)):
        with pytest.raises(UserError, match="plan: made for another model; make it from this model's scores"):
            write(source, other, tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_the_output_can_be_checked_before_any_work(written, interrupted, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    check_output(tmp_path / "new" / "q")
    check_output(interrupted, resume=True)
    for out, message in (
        (written[0], "already holds a finished checkpoint; give another --out or remove it"),
        (interrupted, "an interrupted write; add --resume to go on with it, or give another --out"),
        (tmp_path / "full", "not empty, and no checkpoint of lq; give a new directory"),
        (tmp_path / "file", "is no directory; give a new directory"),
        (tmp_path / "file" / "q", "file is no directory; give a new directory"),
        (tmp_path / "link", "is no directory; give a new directory"),
    ):
        with pytest.raises(UserError, match=rf"^{out}: [^\n]*{message}$"):
            check_output(out)
    assert sorted(tmp_path.rglob("*")) == before, "nothing is made"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere: no directory is closed to it")
def test_an_output_that_cannot_be_written_to_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(
        UserError, match=f"^{tmp_path / 'a' / 'q'}: {tmp_path} cannot be written to; give another --out$"
    ):
        check_output(tmp_path / "a" / "q")


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
    manifest = unsealed(json.loads((copy / "lq.json").read_text()))
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
    manifest = unsealed(json.loads((copy / "lq.json").read_text()))
    (copy / "lq.json").write_text(json.dumps(replace(manifest, where.split(), value)))
    with pytest.raises(UserError, match=r"^[^\n]*lq\.json: damaged [^\n]*; quantize again$"):
        open_quantized(copy)


def test_a_later_format_is_refused(copy):
    manifest = unsealed(json.loads((copy / "lq.json").read_text()))
    (copy / "lq.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(UserError, match="format 99, this lq reads 1"):
        open_quantized(copy)


def test_a_config_of_another_model_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(UserError, match=r"config\.json: not as it was when it was quantized; copy it again"):
        open_quantized(copy)
    manifest = unsealed(json.loads((copy / "lq.json").read_text()))
    del manifest["files"]
    (copy / "lq.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"config\.json: of another model than lq\.json"):
        open_quantized(copy)


def test_a_bit_that_changed_in_the_manifest_is_found(copy):
    data = bytearray((copy / "lq.json").read_bytes())
    data[data.index(b'"scale_dtype":"') + 20] ^= 1
    (copy / "lq.json").write_bytes(data)
    with pytest.raises(UserError, match=r"lq\.json: damaged .*its checksum does not match"):
        open_quantized(copy)


def test_a_lost_tokenizer_is_found(copy):
    name = next(
        file.name for file in copy.iterdir() if file.suffix == ".json" and file.name not in ("lq.json", "config.json")
    )
    (copy / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: not as it was when it was quantized"):
        open_quantized(copy)


def test_an_interrupted_write_by_other_code_is_refused(source, written, interrupted):
    record = unsealed(json.loads((interrupted / "shards.json").read_text()))
    record["identity"]["code"]["lq"] = "0.0.9, sources 0123456789ab"
    (interrupted / "shards.json").write_text(json.dumps(sealed(record)))
    with pytest.raises(
        UserError, match=r"an interrupted write of another code\.lq \(0\.0\.9, sources 0123456789ab there"
    ):
        write(source, written[1], interrupted, resume=True)


def test_one_process_writes(source, written, tmp_path):
    out = tmp_path / "q"
    with held(out), pytest.raises(UserError, match=r"q: process \d+ on .* writes to it; wait for that to end"):
        write(source, written[1], out)
    assert not out.exists()
