"""The report on a comparison, and how it looks. The runs are pretended."""

import html.parser
import itertools
import json
import math
import re
import shutil
import subprocess
from collections import Counter

import pytest
from PIL import Image

from fastprefix.training.compare import run_compare
from fastprefix.training.grid import CompareConfig
from fastprefix.training.report import write_report
from fastprefix.training.tables import (
    Figure,
    best_cell,
    costs_table,
    count,
    digits_of,
    is_better,
    level_with,
    metric_title,
    rates_table,
    scored_cells,
    scores_table,
    size,
    step_time,
)
from fastprefix_testing.pretended_runs import InThisProcess, train

NASTY = "<script>alert('x')</script> & $x_1$ | *star* `tick`"
CONFIG = {
    "title": f"Ways to train {NASTY}",
    "notes": f"First.\n\nSecond {NASTY}",
    "base": {"task": "e2e_nlg", "max_steps": 40},
    "methods": {
        "no tuning": {"method": "none"},
        "prefix": {"method": "prefix", "learning_rate": [1e-3, 1e-2, 1e-1]},
        f"LoRA {NASTY}": {"method": "lora", "options": {"r": 8}},
        "full fine-tuning": {"method": "full", "learning_rate": [1e-3, 1e-2]},
        "broken": {"method": "prompt", "options": {"pretend": "raise"}},
    },
    "grid": {"options.num_virtual_tokens": [5, 20, 100]},
    "vary": ["prefix"],
    "seeds": [0, 1, 2],
}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def compared(config, folder):
    return run_compare(CompareConfig.of(config), folder, engine=InThisProcess(), train=train)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    comparison = compared(CONFIG, folder)
    write_report(comparison, folder, command=f"fastprefix compare '{NASTY}'")
    return comparison, folder


class Page(html.parser.HTMLParser):
    """Tags, attributes and the text of a page; refuses tags that are not closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.texts, self.open = Counter(), [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_one_file_that_loads_nothing(made):
    _, folder = made
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags["script"] == page.tags["link"] == page.tags["iframe"] == 0
    assert page.tags["img"] == 4  # methods, parameters, along the grid, losses
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert not re.search(r"url\(|@import|https?://", re.sub(r"base64,[\w+/=]+", "", text))


def test_all_text_is_escaped(made):
    _, folder = made
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    told = " ".join("".join(page.texts).split())
    assert told.count(NASTY) > 5  # title, notes, method, command
    assert "got pretend, takes <less> | *more*" in told
    assert "Alimentum <b>is</b> a | place" in told
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    outside = re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "<" not in outside
    rows = [line for line in outside.splitlines() if line.startswith("|")]
    for line, after in itertools.pairwise(rows):
        if re.fullmatch(r"[|: -]+", after):
            columns = len(re.findall(r"(?<!\\)\|", after))
        if "LoRA" in line:
            assert len(re.findall(r"(?<!\\)\|", line)) == columns
            assert r"\*star\*" in line


def test_the_markdown_shows_its_pictures(made):
    _, folder = made
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    named = re.findall(r"!\[[^\]]+\]\((.+?)\)", markdown)
    assert named == [f"pictures/{name}.png" for name in (
        "methods", "parameters", "grid-num-virtual-tokens", "losses")]  # fmt: skip
    for name in named:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_both_say_what_was_found(made):
    _, folder = made
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    pages = " ".join("".join(page.texts).split())
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    for text in (pages, markdown.replace("\\", "")):
        assert "Best: full fine-tuning, BLEU 57.00 ± 0.00." in text
        assert "23 of 26 runs finished, seeds 0, 1, 2." in text
        assert "Measured on 2 CPU cores, pretended." in text
        assert "3 runs failed" in text
        assert "broken, seed 1" in text
        assert "134,515,008" in text
        assert "Reference of name[Aromi], eatType[coffee shop]." in text
        assert '"machine": "2 CPU cores, pretended"' in text
        assert "num_virtual_tokens:" in text  # the configuration


def test_the_same_comparison_gives_the_same_report(made, tmp_path):
    comparison, folder = made
    write_report(comparison, tmp_path, command=f"fastprefix compare '{NASTY}'")
    for name in ("report.html", "report.md", "pictures/losses.png"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_scores_are_means_over_seeds(made):
    comparison, _ = made
    table = scores_table(comparison)
    assert [column.title for column in table.columns] == [
        "method", "num virtual tokens", "BLEU", "chrF", "ROUGE-L", "loss", "learning rate", "seeds",
    ]  # fmt: skip
    cell = comparison.cells[2]
    assert cell.label == "prefix, num virtual tokens 20"
    row = table.rows[2]
    values = [o.result["test"]["bleu"] for o in comparison.chosen(cell)]
    mean = sum(values) / 3
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / 2)
    assert row[:3] == ["prefix", "20", f"{mean:.2f} ± {spread:.2f}"]
    assert row[-2:] == ["0.01", "3"]
    assert table.rows[-1][2:] == ["–"] * 6  # it failed
    assert {table.rows[i][j] for i, j in table.strong} == {"full fine-tuning", "57.00 ± 0.00"}


def test_costs_name_their_units(made):
    comparison, _ = made
    table = costs_table(comparison)
    rows = {tuple(row[:2]): row[2:] for row in table.rows}
    assert rows["prefix", "20"] == [
        "9,216", "0.0069 %", "36.9 kB", "30 of 40", "0.8", "0.34", "13.6 s", "320 MB",
    ]  # fmt: skip
    assert rows["no tuning", ""] == ["0", "0", "0 B", "0", "–", "–", "–", "–"]


def test_a_step_takes_what_it_takes_where_nothing_disturbs():
    assert step_time([{"seconds_per_step": 4.0}, {"seconds_per_step": 1.0}]) == 1.0
    assert math.isnan(step_time([{"steps": 0}]))


def test_rates_that_were_tried_and_those_at_the_edge(made):
    comparison, _ = made
    table = rates_table(comparison)
    assert [column.title for column in table.columns] == ["method", "0.001", "0.01", "0.1", ""]
    assert len(table.rows) == 4
    assert table.rows[0][-1] == ""
    assert table.rows[3][0] == "full fine-tuning"
    assert table.rows[3][3:] == ["", "at the edge"]
    assert table.strong == {(row, 2) for row in range(4)}


def test_metrics_of_further_test_sets_are_shown_as_their_own_kind():
    assert (metric_title("bleu (new)"), digits_of("bleu (new)")) == ("BLEU (new)", 2)
    assert (metric_title("accuracy (far_off)"), digits_of("accuracy")) == ("accuracy (far_off)", 3)
    assert is_better("loss (new)", 1.0, 2.0)
    assert not is_better("chrf (new)", 1.0, 2.0)


def test_what_is_level_with_the_best(made):
    comparison, _ = made
    cells = {cell.label: cell for cell in comparison.cells}
    longest, shorter = (cells[f"prefix, num virtual tokens {length}"] for length in (100, 20))
    assert best_cell(comparison) == cells["full fine-tuning"]
    assert level_with(comparison, cells["full fine-tuning"]) == []
    spreads = dict(scored_cells(comparison))
    near = abs(spreads[longest].mean - spreads[shorter].mean) <= max(
        spreads[longest].spread, spreads[shorter].spread
    )
    assert (shorter in level_with(comparison, longest)) == near


@pytest.mark.parametrize(
    ("number", "bytes_shown", "count_shown"),
    [(0, "0 B", "0"), (999, "999 B", "999"), (1000, "1 kB", "1 K"), (36_864, "36.9 kB", "36.9 K"),
     (999_999, "1000 kB", "1000 K"), (134_515_008, "135 MB", "135 M"), (2.5e9, "2.5 GB", "2.5 B")],
)  # fmt: skip
def test_sizes_and_counts(number, bytes_shown, count_shown):
    assert (size(number), count(number)) == (bytes_shown, count_shown)


def test_figures_of_one_seed_and_of_runs_that_diverged():
    assert Figure.of([0.5]).show(3) == "0.500"
    assert Figure.of([1.0, 3.0]).show(2) == "2.00 ± 1.41"
    assert Figure.of([1.0, math.nan]).show(1) == "nan ± nan"
    assert Figure.of([1.0, math.inf]).show(1) == "inf ± nan"


def test_a_comparison_of_which_nothing_was_finished(tmp_path):
    broken = {"methods": {"broken": CONFIG["methods"]["broken"]}, "base": CONFIG["base"]}
    write_report(compared(broken, tmp_path), tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "3 runs failed" in text
    assert "0 of 3 runs finished" in text
    assert Page(text).tags["img"] == 0


def test_a_diverged_run_and_one_class_task(tmp_path):
    def diverges(config, folder):
        result = train(config, folder)
        if config.seed == 1:
            result["test"]["loss"] = math.nan
            result["train_loss"] = math.inf
            (folder / "result.json").write_text(json.dumps(result))

    one = {"methods": {"head": {"method": "full"}, "prefix": {}}, "base": {"task": "bbc"}}
    comparison = run_compare(
        CompareConfig.of(one), tmp_path, engine=InThisProcess(), train=diverges
    )
    write_report(comparison, tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "nan ± nan" in markdown
    assert "What they write" not in markdown
    assert "| method | accuracy | F1 | loss |" in markdown


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")
def test_the_page_in_a_browser(made, tmp_path):
    """It shows its pictures: the colours of the methods are there, and so is the warning."""
    _, folder = made
    shot = tmp_path / "page.png"
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,3400",
            f"--screenshot={shot}", (folder / "report.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert shot.exists(), done.stderr[-2000:]
    with Image.open(shot) as opened:
        picture = opened.convert("RGB")
    assert picture.width == 1200
    seen = {colour: number for number, colour in picture.getcolors(1 << 24)}
    for colour in ("0072B2", "D55E00", "009E73", "CC79A7"):  # of four methods, in the pictures
        assert seen[tuple(bytes.fromhex(colour))] > 50, colour
    assert seen[0xFD, 0xF4, 0xF3] > 10_000  # the frame of the failed runs
    right_edge = picture.crop((1195, 0, 1200, picture.height))
    assert right_edge.getcolors() == [(5 * picture.height, (255, 255, 255))]  # nothing sticks out
