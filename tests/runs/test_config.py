"""Experiment configs: what is wrong is said in one line with the path of the key."""

from pathlib import Path

import pytest
import yaml

from lq.errors import UserError
from lq.runs.config import Experiment, dump_experiment, load_experiment

ROOT = Path(__file__).parent.parent.parent
# Their configs are no runs; the tests of each comparison read all that lie there.
COMPARISONS = [path.parent for path in ROOT.glob("experiments/*/compare.py")]
SHIPPED = sorted(
    path
    for path in [*ROOT.glob("configs/*.yaml"), *ROOT.glob("experiments/*/*.yaml"), ROOT / "lq" / "assets" / "demo.yaml"]
    if path.parent not in COMPARISONS
)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_configs_are_valid(path):
    experiment = load_experiment(path)
    assert isinstance(experiment, Experiment)
    assert path.read_text().startswith("#"), "a config says in its header what it claims and costs"


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "x.yaml"
        path.write_text(text)
        return path

    return write


GOOD = "model: standin\noutput: out\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: x\noutput: y\n", "model: required, not given; and 1 more"),
        (GOOD + "calibration: {sample: 3}\n", "calibration.sample: unknown key"),
        (GOOD + "calibration: {samples: many}\n", "calibration.samples: Input should be a valid integer (got 'many')"),
        (GOOD + "calibration: {samples: 0}\n", "calibration.samples: Input should be greater than 0 (got 0)"),
        (GOOD + "quantization: {group_size: 100}\n", "quantization.group_size: Input should be 32, 64, 128 or 256"),
        (GOOD + "allocation: {bits: [2, 9]}\n", "allocation.bits.1: Input should be less than or equal to 8 (got 9)"),
        (GOOD + "allocation: {budgets: [-1]}\n", "allocation.budgets.0: Input should be greater than 0 (got -1)"),
        (GOOD + "allocation: {orders: [{metric: lim, seeds: 3}]}\n", "seeds belongs to the metric random, not to lim"),
        (GOOD + "allocation: {orders: [lim, lim]}\n", "allocation.orders: the order 'lim' is listed twice"),
        (GOOD + "moves: {high: 2, low: 4, orders: [lim]}\n", "moves: low (4) must be below high (2)"),
        (GOOD + "allocation: {budgets: [3.0, 2.5, 3]}\n", "allocation.budgets: 3.0 is listed twice; leave one out"),
        (GOOD + "allocation: {budgets: [3.0, 3.0000001]}\n", "3.0000001 and 3.0 are alike in six digits"),
        (GOOD + "allocation: {budgets: [.inf]}\n", "allocation.budgets.0: Input should be a finite number"),
        (GOOD + "baselines: {uniform: [4, 4]}\n", "baselines.uniform: 4 is listed twice; leave one out"),
        (GOOD + "evaluation: {batch_size: 0}\n", "evaluation.batch_size: Input should be greater than 0 (got 0)"),
        (GOOD + "evaluation: {batch_size: -8}\n", "evaluation.batch_size: Input should be greater than 0 (got -8)"),
        (GOOD + "evaluation: {window: 8, stride: 9}\n", "evaluation: stride (9) must not be above window (8)"),
        (GOOD + "calibration: {batch_size: 0}\n", "calibration.batch_size: Input should be greater than 0 (got 0)"),
        (GOOD + "calibration: {samples: 10000000}\n", "Input should be less than or equal to 1000000 (got"),
        (
            GOOD + "allocation: {orders: [{metric: random, seeds: 1000000}]}\n",
            "less than or equal to 1000 (got 1000000)",
        ),
        (
            GOOD + "allocation: {orders: [{metric: random, options: {seed: x}}]}\n",
            "0.options: seed: 'x' is not a",
        ),
        (
            GOOD + "allocation: {orders: [{metric: random, options: {seed: -1}}]}\n",
            "0.options: seed: -1 is not a",
        ),
        (GOOD + "allocation: {orders: [random, {metric: random, options: {seed: 7}}]}\n", "order 'random' is listed"),
        (
            GOOD + "quantization: {method: rtm}\n",
            "x.yaml: quantization.method: unknown quantizer 'rtm'; known: rtn, hqq, gptq, ",
        ),
        (GOOD + "quantization: {options: {clap: mse}}\n", "quantization.options: quantizer rtn: unknown option 'clap'"),
        (GOOD + "quantization: {options: {clip: 3}}\n", "quantization.options: quantizer rtn: option clip: 3 is not"),
        (GOOD + "quantization: {options: {convention: symf}}\n", "quantization: rtn: convention 'symf' does not fit"),
        (GOOD + "allocation: {method: rink}\n", "allocation.method: unknown allocator 'rink'; known: rank"),
        (GOOD + "allocation: {orders: [zd, limm]}\n", "allocation.orders.1.metric: unknown metric 'limm'; known: lim"),
        (
            GOOD + "moves: {orders: [kurtosis]}\n",
            "moves: kurtosis orders units matrix, and the sweep moves blocks; write unit: block",
        ),
        (GOOD + "moves: {orders: [{metric: xd}]}\n", "moves.orders.0.metric: unknown metric 'xd'; known: lim"),
        (
            GOOD + "allocation: {orders: [{metric: zd, options: {side: two}}]}\n",
            "allocation.orders.0.options: metric zd: unknown option 'side'",
        ),
        (
            GOOD + "allocation: {orders: [{metric: lim, options: {batch_size: 0}}]}\n",
            "allocation.orders.0.options: batch_size: 0; write 1 or more",
        ),
        (
            GOOD + "allocation: {pins: [{match: '(', bits: 4}]}\n",
            "allocation.pins.0.match: '(' is not a regular expression",
        ),
        (
            GOOD + "allocation: {pins: [{match: x, bits: 9}]}\n",
            "allocation.pins.0.bits: 9; write 1 to 8, or 16 to leave it dense",
        ),
        (GOOD + "allocation: {embedding_bits: 12}\n", "allocation.embedding_bits: 12; write 1 to 8, or 16 to leave"),
        (GOOD + "allocation: {head_bits: 0}\n", "allocation.head_bits: 0; write 1 to 8, or 16 to leave it dense"),
        (GOOD + "output: twice\n", "x.yaml:3: the key output is given twice; keep one"),
        (GOOD + "evaluation:\n  window: 8\n  stride: 2\n  window: 9\n", "x.yaml:6: the key window is given twice"),
        (GOOD + "moves: {orders: [{metric: lim, metric: zd}]}\n", "x.yaml:3: the key metric is given twice; keep one"),
        ("just text\n", "expected keys such as model: and output:, found str"),
        ("a: [1\n", ":2: not valid YAML"),
    ],
)
def test_a_mistake_is_one_line(config, text, message):
    path = config(text)
    with pytest.raises(UserError) as error:
        load_experiment(path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert "(got" not in str(error.value).partition("; ")[2]


def test_a_key_may_override_what_is_merged(config):
    x = load_experiment(config(GOOD + "calibration: &text {data: a.txt}\nevaluation: {<<: *text, data: b.txt}\n"))
    assert (x.calibration.data, x.evaluation.data) == ("a.txt", "b.txt")


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such config; see configs/ for examples"):
        load_experiment(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="a directory; give a YAML file"):
        load_experiment(tmp_path)


def test_overrides_are_yaml_values(config):
    path = config(GOOD)
    x = load_experiment(path, ["allocation.budgets=[3, 2.5]", "title=A b", "evaluation.windows=3"])
    assert x.allocation.budgets == [3, 2.5]
    assert x.title == "A b"
    assert x.evaluation.windows == 3


@pytest.mark.parametrize(
    "item", ["noequals", "=3", "a..b=1", "model.x=1", "title=[1", "evaluation={window: 8, window: 9}"]
)
def test_a_bad_override_is_refused(config, item):
    with pytest.raises(UserError):
        load_experiment(config(GOOD), [item])


def test_orders_with_different_options_are_different_orders(config):
    text = GOOD + "allocation: {orders: [zd, {metric: zd, options: {sides: two}}, {metric: zd, reverse: true}]}\n"
    x = load_experiment(config(text))
    assert [order.name for order in x.allocation.orders] == ["zd", "zd sides=two", "reverse zd"]


@pytest.mark.parametrize(
    ("order", "seeds"),
    [
        ("random", [0]),
        ("{metric: random, seeds: 3}", [0, 1, 2]),
        ("{metric: random, options: {seed: 7}}", [7]),
        ("{metric: random, seeds: 3, options: {seed: 7}}", [7, 8, 9]),
        ("lim", [None]),
    ],
)
def test_random_orders_start_at_the_given_seed(config, order, seeds):
    (found,) = load_experiment(config(GOOD + f"allocation: {{orders: [{order}]}}\n")).allocation.orders
    assert found.each_seed() == seeds
    assert found.name in ("random", "lim")


def test_a_batch_size_is_no_part_of_an_order(config):
    lim = "{metric: lim, options: {batch_size: 4, aggregation: flat}}"
    x = load_experiment(config(GOOD + f"allocation: {{orders: [{lim}, lim]}}\n"))
    assert [order.name for order in x.allocation.orders] == ["lim aggregation=flat", "lim"]
    with pytest.raises(UserError, match="the order 'lim' is listed twice"):
        load_experiment(config(GOOD + "allocation: {orders: [lim, {metric: lim, options: {batch_size: 4}}]}\n"))


def test_the_written_config_reads_back_the_same(config):
    x = load_experiment(config(GOOD + "allocation: {orders: [lim, {metric: random, seeds: 2}], budgets: [3.0]}\n"))
    assert Experiment.model_validate(yaml.safe_load(dump_experiment(x))).model_dump() == x.model_dump()
