"""What is planned for a model against what it is: arrays that were made, sizes that plans count."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import llama_config, random_params
from typer.testing import CliRunner

from lq.allocation import uniform_plan
from lq.calibration.data import Windows
from lq.cli import app
from lq.errors import UserError
from lq.models.context import DecodeState
from lq.models.matrices import table_matrices
from lq.models.source import InMemory
from lq.numerics.spec import QuantSpec
from lq.parallel import mesh_shape
from lq.parallel.devices import MEMORY, Topology, topology
from lq.parallel.memory import Step, abstract_model, device_bytes, sharded_model, sharded_state
from lq.parallel.mesh import abstract_mesh
from lq.parallel.planning import memory, plan_for
from lq.quantizers import QUANTIZERS, Recipe, quantized_source

pytestmark = pytest.mark.once

CONFIG = llama_config(3, 256)
SPEC = QuantSpec(bits=3, group_size=32)
STEP = Step(batch=8, length=64)


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        dataclasses.replace(SPEC, symmetric=True, scale_dtype="float16"),
        dataclasses.replace(SPEC, group_size=None, zero_dtype="bfloat16"),
        dataclasses.replace(SPEC, rank=8),
        dataclasses.replace(SPEC, by_energy=True),
        dataclasses.replace(SPEC, bits=4, widths=(4, 4, 2, 1)),
    ],
    ids=str,
)
def test_abstract_models_are_those_a_quantizer_makes(spec):
    config = llama_config(1, 256)
    recipe, text = Recipe(), None
    if spec.zero_dtype is not None:
        recipe = Recipe(method="hqq", options=QUANTIZERS.options("hqq", {}))
    if spec.ordered:
        recipe = Recipe(method="rtn", options=QUANTIZERS.options("rtn", {"clip": "opt", "importance": True}))
        text = Windows(np.random.default_rng(0).integers(1, 4096, (2, 16), np.int32), "random", "random")
    specs = uniform_plan(config, spec).specs
    made = quantized_source(InMemory(config, random_params(config)), specs, recipe, text).params()
    described = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert described(abstract_model(config, specs)) == described(made)


def test_one_device_holds_what_the_plan_counts():
    specs = uniform_plan(CONFIG, SPEC).specs | {
        path: dataclasses.replace(SPEC, bits=4) for path in table_matrices(CONFIG)
    }
    plan = dataclasses.replace(uniform_plan(CONFIG, SPEC), specs=specs)
    on_one = sharded_model(CONFIG, abstract_model(CONFIG, specs), abstract_mesh(mesh_shape("")))
    assert device_bytes(on_one) == plan.nbytes
    state = jax.eval_shape(lambda: DecodeState.empty(CONFIG, STEP.batch, STEP.length, jnp.bfloat16))
    assert device_bytes(sharded_state(CONFIG, STEP, abstract_mesh(mesh_shape(""))).caches) == state.cache_nbytes


def test_devices_share_what_they_can():
    plan = uniform_plan(CONFIG, SPEC)
    held = lambda mesh: memory(CONFIG, plan, STEP, mesh, None, compiles=False)  # noqa: E731
    one, tensor, data = held(None), held("tensor=2"), held("data=4")
    norms = 2 * (2 * CONFIG.num_blocks + 1) * CONFIG.hidden_size
    assert tensor.weights == (one.weights - norms) // 2 + norms
    assert data.weights == one.weights
    assert (tensor.cache, data.cache) == (one.cache // 2, one.cache // 4)
    assert one.bpw == plan.bpw
    assert one.fits is None


def test_what_would_fit_where_it_does_not():
    """3.6 megabytes a device: on some it fits and on half of these not, and here with so many bits."""
    plan = plan_for(CONFIG, 6.0, None, [2, 3, 4, 5, 6, 8], SPEC)
    assert 5.5 < plan.bpw <= 6.0
    small = Topology("h100", 1, 3_600_000)
    found = memory(CONFIG, plan, STEP, None, small, compiles=False)
    assert found.fits is False
    wide, half = (
        memory(CONFIG, plan, STEP, f"tensor={count}", None, compiles=False)
        for count in (found.fitting_devices, found.fitting_devices // 2)
    )
    assert wide.total <= small.memory < half.total
    narrower = plan_for(CONFIG, found.fitting_bpw, None, range(1, 9), SPEC)
    assert memory(CONFIG, narrower, STEP, None, small, compiles=False).fits
    none = memory(CONFIG, plan, STEP, None, Topology("h100", 1, 1000), compiles=False)
    assert (none.fitting_devices, none.fitting_bpw) == (None, None)
    assert ("a size that would fit here", "none does") in none.lines()


def test_topologies():
    assert topology("v5e:2x4") == Topology("v5e", 8, 16 << 30, "v5e:2x4")
    assert topology("v5p:2x2x1") == Topology("v5p", 4, 95 << 30, "v5p:2x2x1")
    assert topology("h200x8") == Topology("h200", 8, MEMORY["h200"])
    assert topology("h200").count == 1
    for wrong in ("v5e", "v9:2x2", "h200:8", "x8"):
        with pytest.raises(UserError, match=r"^topology: .*; write a slice of v4, v5e, v5p or v6e such as v5e:2x4"):
            topology(wrong)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--bpw", "3.4", "--mesh", "tensor=3,tensor=2"], "lq: mesh: 'tensor=2'; write axes once"),
        (["--mesh", "tensor=4", "--topology", "h200x8"], "lq: mesh: tensor=4 takes 4 devices, and h200 x 8 has 8"),
        (["--bpw", "1.5"], "lq: budget: 1.5 bits per weight"),
        (["--length", "100000"], "lq: length: 100000 tokens, but the model's context is 128"),
        (["--bpw", "3", "--plan", "x.json"], "lq: plan-memory: --plan and --bpw are both given; leave one out"),
        (["--kv-bits", "5"], "lq: kv_bits: 5; write 4 or 8, or 16"),
    ],
)
def test_the_command_refuses_what_cannot_be(small_model, arguments, line):
    done = CliRunner().invoke(app, ["plan-memory", str(small_model.path), *arguments])
    assert done.exit_code == 2
    assert done.stderr.startswith(line)


def test_the_command_reads_a_config_alone(small_model, tmp_path):
    shutil.copyfile(small_model.path / "config.json", tmp_path / "config.json")
    command = ["plan-memory", str(tmp_path), "--bpw", "3.4", "--group-size", "32", "--topology", "h200x2"]
    done = CliRunner().invoke(app, [*command, "--length", "64", "--json", str(tmp_path / "found.json")])
    assert done.exit_code == 0, done.stderr
    assert "it fits" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["fits"] is True
    assert found["total"] == found["weights"] + found["cache"]
    assert found["mesh"]["tensor"] == 2
    assert 3.0 < found["bpw"] <= 3.4
