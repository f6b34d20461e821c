"""The report: every number is there, readable, in one file, whatever the numbers are."""

import csv
import dataclasses
import html.parser
import itertools
import math
import random
import re
import statistics
import subprocess
import sys

import pytest

from lq.errors import UserError
from lq.runs.figures.curves import draw_curve
from lq.runs.figures.style import matplotlib_figure, order_styles
from lq.runs.report import write_report
from lq.runs.results import Results, Row
from lq.runs.summary import NONE, TIMES, format_bytes, format_number, plan_curves, sections, sweep_curves
from lq.runs.tables import csv_text, format_table

pytestmark = pytest.mark.once

BLOCKS = 16
PARAMETERS = 9_437_184
ORIGINAL = 12.345678  # perplexity
BUDGETS = (3.5, 3.0, 2.5)
PLANNED = ("lim", "zd", "first_last", "random", "reverse lim", "reverse zd")


def row(bits: tuple[float, ...], harm: float, *, name: str, group: str, **fields) -> Row:
    """A measured model whose perplexity grows with `harm`, in nats."""
    code_bits = sum(bits) / len(bits)
    size = round(PARAMETERS * (code_bits + 0.25) / 8)
    measured = Row(
        name=name,
        group=group,
        code_bits=code_bits,
        bpw=code_bits + 0.25,
        bytes_on_disk=size + 4096,
        bytes_on_device=size,
        perplexity=ORIGINAL * math.exp(harm),
        kl=0.9 * harm + 1e-4,
        top1=math.exp(-harm / 2),
        bits_per_block=bits,
    )
    return dataclasses.replace(measured, **fields)


def importance(name: str, seed: int = 0) -> tuple[float, ...]:
    noise = random.Random(f"{name} {seed}")
    shapes = {
        "lim": lambda i: 0.9 * math.exp(-i / 2) + 0.25 * math.exp((i - BLOCKS) / 2) + 0.02 * noise.random(),
        "zd": lambda i: 0.1 + 0.02 * math.sin(i) + 0.01 * noise.random(),
        "first_last": lambda i: abs(i - (BLOCKS - 1) / 2),
    }
    return tuple(shapes.get(name, lambda i: noise.random())(i) for i in range(BLOCKS))


TRUTH = importance("lim")


def lowered(order: str, count: int, seed: int = 0) -> tuple[tuple[float, ...], float]:
    """Widths when the `count` least important blocks go from 4 to 2 bits, and the harm that does."""
    base = order.removeprefix("reverse ")
    scores = importance(base, seed)
    ranked = sorted(range(BLOCKS), key=lambda i: scores[i], reverse=order != base)
    low = set(ranked[:count])
    harm = 0.02 + sum((0.02 + 0.6 * TRUTH[i]) for i in low)
    return tuple(2.0 if i in low else 4.0 for i in range(BLOCKS)), harm


def realistic(**changes) -> Results:
    """16 blocks; uniform 8, 4, 3, 2; three budgets times six orders, random in five seeds; a sweep of three orders."""
    unquantized = {"bpw": 16.0, "kl": None, "top1": None, "bits_per_block": ()}
    harms = {8: 0.001, 4: 0.02, 3: 0.21, 2: 2.9}
    rows = [
        row((16.0,) * BLOCKS, 0, name="original", group="original", **unquantized),
        *(row((float(b),) * BLOCKS, harm, name=f"uniform {b}", group="uniform") for b, harm in harms.items()),
        row((3.0,) * BLOCKS, 0.17, name="uniform 3 groups of 64", group="finer_groups", bpw=3.5),
        row((2.0,) * BLOCKS, 1.7, name="uniform 2 groups of 32", group="finer_groups", bpw=3.0),
    ]
    for budget, order in itertools.product(BUDGETS, PLANNED):
        for seed in range(5) if order == "random" else (None,):
            bits, harm = lowered(order, round((4.25 - budget) / 2 * BLOCKS), seed or 0)
            name = f"{order} @ {budget}" if seed is None else f"random {seed} @ {budget}"
            origin = {"order": order, "seed": seed, "target_bpw": budget, "bytes_on_disk": None}
            rows.append(row(bits, harm, name=name, group="plan", **origin))
    for order, count in itertools.product(("lim", "zd", "reverse lim"), range(BLOCKS + 1)):
        bits, harm = lowered(order, count)
        rows.append(row(bits, harm, name=f"{order}: {count} of {BLOCKS} blocks at 2 bits", group="move", order=order))
    results = Results(
        title="Layer-wise plans on the stand-in model",
        model={"name": "standin", "family": "llama", "blocks": BLOCKS, "parameters": PARAMETERS, "dtype": "bfloat16"},
        protocol={"corpus": "standin/validation.txt", "window": 512, "stride": 512, "tokens": 12_288},
        quantizer={"method": "rtn", "group_size": 128, "symmetric": False, "counted": "block matrices"},
        environment={
            "versions": {"lq": "0.1.0", "jax": "0.10.2", "flax": "0.12.1", "numpy": "2.4.0"},
            "device": "cpu, 2 cores",
            "python": "3.12.4",
            "seeds": [0, 1, 2, 3, 4],
        },
        scores={"lim": TRUTH, "zd": importance("zd")},
        rows=tuple(rows),
        conclusion="At 3.0 bits per weight lim reaches perplexity 21.10, random orders 43.1 ± 14.",
    )
    return dataclasses.replace(results, **changes)


class Page(html.parser.HTMLParser):
    """What a browser would find: text, tags, every attribute, and whether the tags close in order."""

    VOID = ("meta", "br", "img", "hr", "link", "input")

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.texts.append(data)


@pytest.fixture(scope="module")
def realistic_page(tmp_path_factory) -> Page:
    return Page(write_report([("run", realistic())], tmp_path_factory.mktemp("report")))


def changed(results: Results, names: str | tuple[str, ...], **fields) -> Results:
    rows = tuple(dataclasses.replace(row, **fields) if row.name in names else row for row in results.rows)
    return dataclasses.replace(results, rows=rows)


def test_page_names_title_conclusion_and_every_fact(realistic_page):
    results = realistic()
    assert realistic_page.texts.count(results.title) == 2  # in the window and on the page
    assert results.conclusion in realistic_page.text
    for fact in ("9,437,184", "standin/validation.txt", "12,288", "group size", "0.10.2"):
        assert fact in realistic_page.text


def test_page_shows_the_numbers_of_every_row(realistic_page):
    for row in realistic().rows:
        shown = [f"{row.bpw:.3f}", f"{row.code_bits:.3f}", format_number(row.perplexity), format_number(row.kl)]
        shown += [format_bytes(row.bytes_on_device)]
        assert all(number in realistic_page.text for number in shown), row.name
        assert ("title", f"{row.bytes_on_device:,} bytes") in realistic_page.attributes
        assert row.name in realistic_page.source


def test_page_needs_nothing_from_anywhere(realistic_page):
    assert not {"script", "link", "img", "iframe", "object"} & set(realistic_page.tags)
    references = [value for name, value in realistic_page.attributes if name in ("src", "href", "xlink:href", "data")]
    assert references  # markers inside the figures
    assert all(reference.startswith("#") for reference in references)
    assert "@import" not in realistic_page.source
    assert not re.search(r"url\((?!#)", realistic_page.source)


def test_page_has_every_figure_with_unique_ids_and_a_description(realistic_page):
    assert realistic_page.tags.count("svg") == 5  # perplexity, KL and bits of the plans; perplexity and KL of the sweep
    assert [name for name, _ in realistic_page.attributes].count("aria-label") == 5
    ids = [value for name, value in realistic_page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:href="|url\()#([^")]+)', realistic_page.source)
    assert set(targets) <= set(ids)


def test_page_marks_the_best_order_of_each_budget(realistic_page):
    best = re.findall(r'<tr class=best><th[^>]*title="([^"]*)"', realistic_page.source)
    assert best == ["lim @ 3.5", "lim @ 3.0", "lim @ 2.5"]


def test_text_is_escaped_everywhere(tmp_path):
    evil = '<script>alert("x")</script> & $y_$'
    results = realistic(title=evil, conclusion=evil, model={evil: evil}, scores={evil: TRUTH})
    results = changed(changed(results, "lim @ 3.0", order=evil, name=evil), "uniform 3", name=evil + "2")
    page = Page(write_report([(evil, results), ("other", results)], tmp_path))
    assert "script" not in page.tags
    assert page.texts.count(f"{evil}: {evil}") == 0  # name and title are the same: said once
    assert page.text.count(evil) > 5


@pytest.mark.parametrize("value", [math.inf, math.nan, 1e300, 123456.7])
@pytest.mark.parametrize(
    "names", [("original",), ("uniform 3", "lim @ 3.0", "random 2 @ 2.5", "zd: 5 of 16 blocks at 2 bits")]
)
def test_collapsed_models_do_not_break_the_report(tmp_path, names, value):
    results = changed(realistic(), names, perplexity=value, kl=value)
    page = Page(write_report([("run", results)], tmp_path))
    assert page.text.count(format_number(value)) >= 2 * len(names)
    assert page.tags.count("svg") == 5
    assert format_number(value) in format_table([("run", results)])


def test_nothing_finite_at_all(tmp_path):
    rows = [dataclasses.replace(row, perplexity=math.nan, kl=math.inf, top1=math.nan) for row in realistic().rows]
    results = realistic(rows=tuple(rows), scores={"lim": (math.nan,) * BLOCKS, "zd": (math.inf, *TRUTH[1:])})
    page = Page(write_report([("run", results)], tmp_path))
    assert "class=best" not in page.source
    assert "* best" not in format_table([("run", results)])


@pytest.mark.parametrize(
    "name", ["original", "uniform 3", "lim @ 3.0", "random 1 @ 3.0", "lim: 4 of 16 blocks at 2 bits", None]
)
def test_results_of_one_row_or_none(tmp_path, name):
    rows = tuple(row for row in realistic().rows if row.name == name)
    page = Page(write_report([("run", realistic(rows=rows, scores={}))], tmp_path))
    assert page.source.count('scope="row"') == len(rows)
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_no_sweep_no_kl_no_widths(tmp_path):
    rows = [row for row in realistic().rows if row.group != "move"]
    rows = [dataclasses.replace(row, kl=None, top1=None, bits_per_block=()) for row in rows]
    page = Page(write_report([("run", realistic(rows=tuple(rows)))], tmp_path))
    assert page.tags.count("svg") == 1
    assert "lowered one by one" not in page.text


@pytest.mark.parametrize(
    ("missing", "headings"),
    [
        ({}, []),
        ({"bytes_on_disk": None}, ["disk MB"]),
        ({"bytes_on_disk": None, "kl": None, "top1": None}, ["disk MB", "KL", "top-1 %"]),
    ],
)
def test_a_column_that_no_row_fills_is_not_shown(tmp_path, missing, headings):
    results = realistic(rows=tuple(dataclasses.replace(row, **missing) for row in realistic().rows))
    page = Page(write_report([("run", results)], tmp_path))
    table = format_table([("run", results)], width=200)
    for heading in ("bpw", "perplexity", "KL", "top-1 %", "disk MB", "device MB"):
        assert (f">{heading}</abbr>" in page.source) == (heading not in headings)
        assert (heading.split()[0] in "".join(table.splitlines()[:2])) == (heading not in headings)
    cells = {len(re.findall("<t[hd][ >]", line)) for line in page.source.split("<tr") if 'scope="row"' in line}
    assert cells == {9 - len(headings)}
    assert "bytes_on_disk" in (tmp_path / "results.csv").read_text()


def test_several_runs_are_compared_by_their_ratios(tmp_path):
    first = realistic()
    rows = tuple(dataclasses.replace(row, perplexity=2 * row.perplexity) for row in first.rows)
    second = realistic(title="Another model", rows=rows, protocol={**first.protocol, "window": 2048})
    page = Page(write_report([("runs/a", first), ("runs/b", second)], tmp_path))
    assert "2 runs compared" in page.text
    assert "The protocols differ (window)" in page.text
    assert "runs/b: Another model" in page.text
    assert page.tags.count("svg") == 12
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_equal_results_give_equal_bytes(tmp_path):
    def files(folder) -> dict[str, bytes]:
        write_report([("run", realistic())], folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    first = files(tmp_path / "a")
    assert sorted(first) == ["report.html", "report.png", "results.csv"]  # and no temporary files
    assert first == files(tmp_path / "b")
    assert first == files(tmp_path / "a")  # replaces what is there


def test_user_settings_of_matplotlib_change_nothing(tmp_path):
    import matplotlib

    path = write_report([("run", realistic())], tmp_path / "a")
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "svg.fonttype": "path"}):
        other = write_report([("run", realistic())], tmp_path / "b")
        assert matplotlib.rcParams["font.size"] == 30
    assert path.read_bytes() == other.read_bytes()


def test_csv_holds_every_field_of_every_row():
    results = changed(realistic(), "uniform 2", perplexity=math.inf)
    read = list(csv.DictReader(csv_text([("a", results), ("b, c", results)]).splitlines()))
    assert [entry.pop("run") for entry in read] == ["a"] * len(results.rows) + ["b, c"] * len(results.rows)
    for entry, row in zip(read, results.rows * 2, strict=True):
        for field in dataclasses.fields(Row):
            value, text = getattr(row, field.name), entry[field.name]
            if field.name == "bits_per_block":
                assert tuple(map(float, text.split())) == value
            elif value is None:
                assert text == ""
            else:
                assert type(value)(text) == value


def test_random_orders_are_one_line_with_mean_deviation_and_range():
    lines = [line for line in plan_curves(realistic())["random"] if line.rows[0].target_bpw == 3.0]
    values = [row.perplexity for row in realistic().rows if row.order == "random" and row.target_bpw == 3.0]
    assert len(lines) == 1
    assert lines[0].mean("perplexity") == pytest.approx(statistics.fmean(values))
    assert lines[0].deviation("perplexity") == pytest.approx(statistics.stdev(values))
    assert lines[0].spread("perplexity") == (min(values), max(values))


def test_plans_are_sorted_by_perplexity_within_their_budget():
    plans = [section for section in sections(realistic()) if section.group == "plan"]
    assert [section.lines[0].rows[0].target_bpw for section in plans] == [3.5, 3.0, 2.5]
    for section in plans:
        values = [line.mean("perplexity") for line in section.lines]
        assert values == sorted(values)
        assert [line.best for line in section.lines] == [True] + [False] * 5


def test_collapsed_plans_come_last_and_are_never_best():
    results = changed(changed(realistic(), "lim @ 3.0", perplexity=math.nan), "zd @ 3.0", perplexity=math.inf)
    (lines,) = [section.lines for section in sections(results) if "budget 3 " in section.heading]
    assert [line.order for line in lines[-2:]] == ["zd", "lim"]
    assert [line.order for line in lines if line.best] == ["first_last"]


def test_two_plans_of_one_order_keep_their_names_apart():
    extra = dataclasses.replace(next(r for r in realistic().rows if r.name == "lim @ 3.0"), name="lim, exact @ 3.0")
    (lines,) = [
        section.lines
        for section in sections(realistic(rows=(*realistic().rows, extra)))
        if section.heading.startswith("Plans, budget 3 ")
    ]
    assert {line.label for line in lines if line.order == "lim"} == {"lim @ 3.0", "lim, exact @ 3.0"}


def test_sweep_counts_the_blocks_below_their_first_width():
    curves = sweep_curves(realistic())
    assert list(curves) == ["lim", "zd", "reverse lim"]
    assert [count for count, _ in curves["zd"]] == list(range(BLOCKS + 1))
    every_third = tuple(row for row in realistic().rows if row.group == "move")[::3]
    counts = [count for count, _ in sweep_curves(realistic(rows=every_third))["lim"]]
    assert counts == [0, 3, 6, 9, 12, 15]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_terminal_table_fits_and_lines_up(width):
    lines = format_table([("run", realistic())], width=width).splitlines()
    assert max(map(len, lines)) <= width
    (best,) = [line for line in lines if "lim" in line and "21.10" in line]
    assert best.startswith("* lim")
    (random_line,) = [line for line in lines if "random, 5 seeds" in line and "3.000" in line]
    spread = lines[lines.index(random_line) + 1]
    assert re.fullmatch(rf"\s+[\d.]+{NONE}[\d.]+", spread)
    assert ("disk" in lines[0]) == (width >= 100)


def test_a_collapsed_model_does_not_press_the_others_flat():
    results = changed(realistic(), ("uniform 2", "reverse lim @ 2.5"), perplexity=3e7)
    with matplotlib_figure() as Figure:
        figure = Figure()
        draw_curve(figure, results, order_styles(results), "perplexity")
    (axes,) = figure.axes
    bottom, top = axes.get_ylim()
    assert bottom < ORIGINAL < top < 200 * ORIGINAL
    assert "off the scale" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_orders_keep_their_look_in_every_run():
    one, two = realistic(), realistic(scores={"kurtosis": TRUTH, "zd": TRUTH})
    apart, together = order_styles(one), order_styles(two, one)
    assert {name: together[name] for name in apart} == apart
    assert together["reverse lim"].colour == together["lim"].colour
    assert len({(style.colour, style.marker, style.reversed) for style in together.values()}) == len(together)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12.345678, "12.35"),
        (9999.4, "9999"),
        (9999.96, f"1.000{TIMES}10⁴"),
        (123456.0, f"1.235{TIMES}10⁵"),
        (0.00123456, "0.001235"),
        (0.0000123, f"1.230{TIMES}10⁻⁵"),
        (0.0, "0"),
        (1.0, "1.000"),
        (math.inf, "∞"),
        (math.nan, "nan"),
        (None, NONE),
    ],
)
def test_numbers_have_four_digits(value, text):
    assert format_number(value) == text


def test_mistakes_are_told(tmp_path):
    with pytest.raises(UserError, match="at least one run"):
        write_report([], tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        write_report([("run", realistic())], tmp_path / "file")


def test_importing_the_report_leaves_matplotlib_alone():
    code = "import sys, lq.runs.report; sys.exit('matplotlib' in sys.modules or 'jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
