"""Which backend is taken, what `explain` says, the forced fallback, lowering for other platforms, tuning tables."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import assert_product, random_matrix, random_rows

from lq_kernels import SegmentedMatrix, explain, export_checks, prepare, quantized_matmul, tuning
from lq_kernels.dispatch import choose, problem_of
from lq_kernels.gpu import OLDEST_JAX
from lq_kernels.registry import automatic, backend_names, load_backend
from lq_kernels.xla_scan import ScanConfig

W = random_matrix(4, 256, 64, 64)
X = random_rows(3, 256)


@pytest.mark.parametrize("name", backend_names())
def test_every_backend_keeps_the_contract(name):
    backend = load_backend(name)
    assert backend.name == name
    for rows in (1, 16, 300):
        problem = problem_of(rows, "bfloat16", W, "bfloat16", None)
        target = backend.target(None)
        candidates = backend.candidates(problem, target)
        assert isinstance(backend.default_config(problem, target), backend.config_type)
        assert candidates
        assert all(isinstance(c, backend.config_type) for c in candidates)
        assert len(set(candidates)) == len(candidates)
        assert hash(problem) == hash(problem_of(rows, "bfloat16", W, "bfloat16", None))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu", "rocm", "metal"])
def test_xla_is_the_last_resort_of_every_platform(platform):
    assert automatic(platform)[-1] == "xla"
    problem = problem_of(3, "float32", W, "float32", "unheard of", devices=8)
    assert choose(problem, platform, W).backend == "xla"


def test_explain_says_what_is_taken_and_why_not_the_others():
    problem = problem_of(2000, "float32", W, "bfloat16", "cpu", devices=8)
    text = str(choose(problem, "cpu", W))
    assert text.startswith("xla: [2000, 256] @ [256, 64] at 4 bits, float32 -> bfloat16, on cpu")
    assert (
        "\n  not xla_scan: the compiler would gather the operands whole to run it on 8 devices; use jax.shard_map"
        in text
    )
    rows = jax.ShapeDtypeStruct((2, 5, 256), jnp.float32)
    assert explain(rows, W).problem.rows == 10
    forced = str(explain(rows, W, backend="xla_scan", config=ScanConfig(64)))
    assert forced.splitlines()[1:] == ["  ScanConfig(chunk=64) (from caller)"]


def test_explain_takes_several_matrices_as_the_product_does():
    assert [choice.problem.out_features for choice in explain(X, [W, random_matrix(2, 256, 32)])] == [64, 32]


def test_explain_takes_the_decision_that_is_taken():
    for rows in (1, 600):
        taken = explain(jax.ShapeDtypeStruct((rows, 256), jnp.float32), W).backend
        automatically = jax.jit(quantized_matmul).lower(random_rows(rows, 256), W).as_text()
        forced = jax.jit(lambda x, w, b=taken: quantized_matmul(x, w, backend=b)).lower(random_rows(rows, 256), W)
        assert automatically == forced.as_text().replace("@jit__lambda ", "@jit_quantized_matmul ")


def test_a_matrix_prepared_for_another_backend_is_served_and_noted():
    pair = prepare([W], backend="xla_scan")
    choice = explain(X, pair, backend="xla")
    assert "prepared for xla_scan; its layout is undone in every call" in choice.note
    assert_product(quantized_matmul(X, pair, backend="xla")[0], X, W)


def test_hopper_declines_64_bit_programs():
    problem = problem_of(3, "bfloat16", W, "bfloat16", "NVIDIA H200")
    if jax.__version_info__ >= OLDEST_JAX:
        assert choose(problem, "cuda", W).backend == "mosaic_gpu"
    with jax.enable_x64(True):
        choice = choose(problem, "cuda", W)
    assert choice.backend == "xla"
    assert "mosaic_gpu" in choice.refusals


def test_an_accelerator_without_its_kernel_says_so_once(caplog):
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        for scale in (1.0, 2.0):
            product = jax.jit(lambda x, w, s=scale: s * quantized_matmul(x, w))
            text = product.trace(X, W).lower(lowering_platforms=("cuda",)).as_text()
            assert "custom_call" not in text
    said = [record.getMessage() for record in caplog.records if record.name == "lq_kernels"]
    assert len(said) == 1
    assert said[0].startswith("packed products on NVIDIA A100-SXM4-80GB go through xla (mosaic_gpu: needs ")


class TestForcedFallback:
    def test_the_environment_forces_a_backend(self, monkeypatch):
        monkeypatch.setenv("LQ_KERNELS_BACKEND", "xla")
        assert explain(X, W).backend == "xla"
        assert_product(quantized_matmul(X, W), X, W)

    def test_an_argument_goes_before_it(self, monkeypatch):
        monkeypatch.setenv("LQ_KERNELS_BACKEND", "xla")
        assert explain(X, W, backend="xla_scan").backend == "xla_scan"

    def test_a_name_that_is_none_is_refused(self, monkeypatch):
        monkeypatch.setenv("LQ_KERNELS_BACKEND", "cublas")
        with pytest.raises(ValueError, match="LQ_KERNELS_BACKEND: no backend is called 'cublas'; known: "):
            quantized_matmul(X, W)


def test_a_gpu_is_one_of_two_platforms():
    for ask in (lambda: explain(X, W, platform="gpu"), lambda: prepare(W, platform="gpu")):
        with pytest.raises(ValueError, match=r"^platform 'gpu' may be either of two: write 'cuda' or 'rocm'$"):
            ask()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("xla_scan", {"chunk": 0}, "ScanConfig: chunk=0; write 1 or more input channels"),
        ("mosaic_tpu", {"columns": 100}, "TpuConfig: columns=100; write a multiple of 128"),
        ("mosaic_tpu", {"activations": "int4"}, "TpuConfig: activations='int4'; write one of bfloat16, digits, int8"),
        ("cpu", {"threads": -1}, "CpuConfig: threads=-1; write 0 for all, or a number"),
        ("mosaic_gpu", {"token_tile": 12}, "GpuConfig: token_tile=12; write 8, 16 ... 128"),
        ("mosaic_gpu", {"pairs": 3}, "GpuConfig: pairs=3; write 1 or 2"),
        ("mosaic_gpu", {"blocks": 0}, "GpuConfig: blocks=0; write 1 or more"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(name, fields, message):
    backend = load_backend(name)
    good = backend.default_config(problem_of(1, "bfloat16", W, "bfloat16", None), backend.target(None))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        dataclasses.replace(good, **fields)


class TestExport:
    leaves, structure = jax.tree.flatten(W)

    def export(self, *platforms, **options):
        """The matrix as plain arrays: whoever calls the program needs nothing of ours."""
        product = jax.jit(lambda x, *leaves: quantized_matmul(x, jax.tree.unflatten(self.structure, leaves)))
        return jax.export.export(product, platforms=platforms, **options)(X, *self.leaves)

    def test_round_trip_on_this_platform(self):
        exported = self.export("cpu", disabled_checks=export_checks())
        again = jax.export.deserialize(exported.serialize())
        assert_product(again.call(X, *self.leaves), X, W)

    @pytest.mark.parametrize("form", ["packed", "segmented", "prepared", "several"])
    def test_a_program_takes_our_matrices_as_arguments(self, form):
        halves = SegmentedMatrix(
            segments=(W.rows(0, 128), W.rows(128, 128)), permutation=jnp.arange(256, dtype=jnp.int32)
        )
        w = {
            "packed": W,
            "segmented": halves,
            "prepared": prepare(halves, backend="mosaic_tpu", device_kind="TPU v6 lite"),
            "several": prepare([W, W]),
        }[form]
        exported = jax.export.export(jax.jit(quantized_matmul), disabled_checks=export_checks())(X, w)
        y = jax.export.deserialize(exported.serialize()).call(X, w)
        for each in y if form == "several" else (y,):
            assert_product(each, X, W)

    def test_another_process_needs_the_import_alone(self, tmp_path):
        exported = jax.export.export(jax.jit(quantized_matmul), disabled_checks=export_checks())(X, W)
        (tmp_path / "program").write_bytes(exported.serialize())
        np.savez(tmp_path / "arrays", X, *self.leaves)
        script = (
            "import sys, jax, numpy as np, lq_kernels\n"
            "exported = jax.export.deserialize(bytearray(open('program', 'rb').read()))\n"
            "x, *leaves = np.load('arrays.npz').values()\n"
            "w = jax.tree.unflatten(exported.in_tree, [x, *leaves])[0][1]\n"
            "np.save('y', exported.call(x, w))\n"
        )
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
        assert_product(np.load(tmp_path / "y.npy"), X, W)

    def test_static_facts_may_be_numpy_scalars(self):
        w = dataclasses.replace(W, bits=np.int64(4), in_features=np.int32(256))
        exported = jax.export.export(jax.jit(quantized_matmul), disabled_checks=export_checks())(X, w)
        assert jax.export.deserialize(exported.serialize()).in_tree == exported.in_tree

    def test_a_number_of_rows_known_later_is_served_by_xla(self):
        (rows,) = jax.export.symbolic_shape("rows")
        x = jax.ShapeDtypeStruct((rows, 256), X.dtype)
        choice = explain(x, W)
        assert choice.backend == "xla"
        assert choice.refusals["xla_scan"] == "the number of rows is symbolic (rows); a kernel is made for a number"
        exported = jax.export.export(jax.jit(quantized_matmul))(x, W)
        again = jax.export.deserialize(exported.serialize())
        for count in (1, 3):
            assert_product(again.call(X[:count], W), X[:count], W)

    def test_one_program_for_several_platforms_holds_the_kernel_of_each(self):
        exported = self.export("cpu", "tpu", disabled_checks=export_checks())
        assert "@tpu_custom_call" in exported.mlir_module()
        assert_product(jax.export.deserialize(exported.serialize()).call(X, *self.leaves), X, W)

    def test_a_matrix_prepared_for_hopper_is_exported_with_its_kernel(self):
        if jax.__version_info__ < OLDEST_JAX:
            pytest.skip("the Hopper kernel needs a newer JAX")
        w = prepare(W, backend="mosaic_gpu", platform="cuda", device_kind="NVIDIA H200")
        leaves, structure = jax.tree.flatten(w)
        product = jax.jit(lambda x, *leaves: quantized_matmul(x, jax.tree.unflatten(structure, leaves)))
        for given, kernel in ((product, True), (jax.jit(lambda x, *_: quantized_matmul(x, W)), False)):
            module = jax.export.export(given, platforms=["cuda"], disabled_checks=export_checks())(
                X, *leaves
            ).mlir_module()
            assert ("mosaic_gpu" in module) == kernel

    def test_a_forced_fallback_exports_for_every_platform_without_custom_calls(self, monkeypatch):
        monkeypatch.setenv("LQ_KERNELS_BACKEND", "xla")
        again = jax.export.deserialize(self.export("cpu", "tpu", "cuda").serialize())
        assert "stablehlo.custom_call" not in again.mlir_module()
        assert_product(again.call(X, *self.leaves), X, W)

    def test_the_traced_program_does_not_know_its_platform(self):
        text = str(jax.make_jaxpr(quantized_matmul)(X, W))
        assert "quantized_matmul[" in text
        assert "pallas" not in text


class TestTuningTables:
    problem = problem_of(3, "float32", W, "float32", "Some CPU (R) 9000")

    @pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (3, 4), (4, 4), (5, 8), (4096, 4096), (9999, 4096)])
    def test_rows_fall_into_the_next_larger_bucket(self, rows, bucket):
        assert tuning.row_bucket(rows) == bucket

    def test_keys_tell_problems_apart(self):
        assert tuning.key(self.problem) == "4g64a K256 N64 M4 float32"
        column = random_matrix(3, 100, 8, 100, asymmetric=False)
        assert tuning.key(problem_of(1, "bfloat16", column, "bfloat16", None)) == "3column K100 N8 M1 bfloat16"

    def write(self, folder, fields):
        table = {"device_kind": "x", "entries": {"xla_scan": {tuning.key(self.problem): fields}}}
        (folder / tuning.file_name("Some CPU (R) 9000")).write_text(json.dumps(table), encoding="utf-8")

    def test_an_entry_is_taken(self, tmp_path, monkeypatch):
        monkeypatch.setenv("LQ_KERNELS_TABLES", str(tmp_path))
        self.write(tmp_path, {"chunk": 64})
        assert (tmp_path / "some_cpu_r_9000.json").exists()
        choice = choose(self.problem, "cpu", W, forced="xla_scan")
        assert (choice.config, choice.config_from) == (ScanConfig(chunk=64), "table")
        other = problem_of(300, "float32", W, "float32", "Some CPU (R) 9000")
        assert choose(other, "cpu", W, forced="xla_scan").config_from == "heuristics"

    def test_an_entry_of_another_version_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setenv("LQ_KERNELS_TABLES", str(tmp_path))
        self.write(tmp_path, {"chunks": 64})
        with pytest.raises(ValueError, match=r"unknown field 'chunks'; fields are chunk. Tune again"):
            choose(self.problem, "cpu", W, forced="xla_scan")

    @pytest.mark.parametrize("text", ["{", "{}", "[]", '{"entries": 3}'])
    def test_a_broken_table_is_named(self, tmp_path, monkeypatch, text):
        monkeypatch.setenv("LQ_KERNELS_TABLES", str(tmp_path))
        (tmp_path / tuning.file_name("Some CPU (R) 9000")).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"some_cpu_r_9000\.json: not a tuning table"):
            choose(self.problem, "cpu", W, forced="xla_scan")

    def test_shipped_tables_hold_configurations_of_their_backends(self):
        for file in tuning.SHIPPED.glob("*.json"):
            for name, entries in json.loads(file.read_text(encoding="utf-8"))["entries"].items():
                for fields in entries.values():
                    load_backend(name).config_type(**fields)


def test_numpy_rows_are_taken():
    assert_product(quantized_matmul(np.asarray(X), W), X, W)
