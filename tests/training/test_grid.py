"""What a comparison runs, and configurations that it refuses."""

import re
from pathlib import Path

import pytest

from fastprefix.training.grid import CompareConfig

BASE = {"task": "e2e_nlg", "max_steps": 4}
PREFIX = {"method": "prefix", "options": {"num_virtual_tokens": 20}}


def config(**fields):
    given = {"base": BASE, "methods": {"prefix": PREFIX, "LoRA": {"method": "lora"}}}
    return CompareConfig.of(given | fields)


def test_without_a_grid_each_method_is_one_cell():
    cells = config().cells()
    assert [(cell.method, cell.point, cell.rates) for cell in cells] == [
        ("prefix", {}, (None,)),
        ("LoRA", {}, (None,)),
    ]
    runs = config(seeds=[3, 5]).first_runs(cells[0])
    assert [run.seed for run in runs] == [3, 5]
    made = runs[1].config
    assert (made.task, made.method, made.seed, made.max_steps) == ("e2e_nlg", "prefix", 5, 4)
    assert made.options == {"num_virtual_tokens": 20}
    assert made.learning_rate is None


def test_a_grid_is_a_product_for_the_methods_that_vary():
    lengths, sizes = "options.num_virtual_tokens", "train_size"
    made = config(grid={lengths: [5, 10], sizes: [50, None]}, vary=["prefix"])
    cells = made.cells()
    assert [cell.label for cell in cells] == [
        "prefix, num virtual tokens 5, train size 50",
        "prefix, num virtual tokens 5, train size null",
        "prefix, num virtual tokens 10, train size 50",
        "prefix, num virtual tokens 10, train size null",
        "LoRA",
    ]
    run = made.first_runs(cells[2])[0].config
    assert (run.options, run.train_size) == ({"num_virtual_tokens": 10}, 50)
    assert made.first_runs(cells[-1])[0].config.options == {}
    assert made.number_of_runs() == 15


def test_a_grid_applies_to_all_methods_where_none_are_named():
    made = config(grid={"train_size": [50, 200]})
    assert [cell.point["train_size"] for cell in made.cells()] == [50, 200, 50, 200]
    assert made.cells()[0].values["options"] == {"num_virtual_tokens": 20}


def test_the_fields_of_a_method_replace_those_of_the_base():
    made = config(base=BASE | {"options": {"init": "text"}, "batch_size": 2})
    prefix, lora = (made.first_runs(cell)[0].config for cell in made.cells())
    assert prefix.options == {"num_virtual_tokens": 20}
    assert lora.options == {"init": "text"}
    assert prefix.batch_size == lora.batch_size == 2


def test_learning_rates_are_tried_with_the_first_seed_and_then_all_seeds_run():
    made = config(methods={"prefix": PREFIX | {"learning_rate": [0.1, 0.01]}}, seeds=[7, 8, 9])
    (cell,) = made.cells()
    first = made.first_runs(cell)
    assert [(run.learning_rate, run.seed) for run in first] == [(0.1, 7), (0.01, 7)]
    assert [run.seed for run in made.runs_at(cell, 0.01)] == [7, 8, 9]
    assert made.number_of_runs() == 4
    assert made.first_runs(cell)[1].config.learning_rate == 0.01
    assert first[0].label == "prefix, learning rate 0.1, seed 7"


def test_what_does_not_train_runs_once():
    made = CompareConfig.of(
        {"base": {"task": "bbc"}, "methods": {"as it is": {"method": "none"}}, "seeds": [3, 4]}
    )
    (cell,) = made.cells()
    assert [run.seed for run in made.first_runs(cell)] == [3]
    assert made.number_of_runs() == 1


def test_the_metric_that_decides_is_the_first_of_the_task_unless_named():
    assert config().deciding_metric == "bleu"
    assert config(metric="loss").deciding_metric == "loss"


def test_a_file_holds_a_configuration(tmp_path):
    file = tmp_path / "compare.yaml"
    file.write_text(config(title="Wärme").yaml(), encoding="utf-8")
    assert CompareConfig.read(file) == config(title="Wärme")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": {}}, "method: unknown; did you mean methods"),
        ({"methods": {}}, "methods: "),
        ({"methods": {"a": {"learning_rates": 1}}}, "methods.a: learning_rates: unknown; did you "
         "mean learning_rate"),
        ({"methods": {"a": {"learning_rate": []}}}, "methods.a: learning_rate: got "),
        ({"methods": {"a": {"learning_rate": [1, 1]}}}, "methods.a: learning_rate: got "),
        ({"methods": {"a": {"learning_rate": [1, "x"]}}}, "learning_rate: got 'x', takes a number"),
        ({"methods": {"a": {"learning_rate": [1, "1.0"]}}}, "methods.a: learning_rate: got "),
        ({"methods": {"a": {"learning_rate": [1, None]}}}, "methods.a: learning_rate: got "),
        ({"methods": {"a": {"learning_rate": -1}}}, "a: learning_rate: got -1.0, takes"),
        ({"methods": {"a": {"method": "prefixes"}}}, "a: method: got 'prefixes', takes 'prefix'"),
        ({"methods": {"a": {"seed": 1}}}, "methods.a: seed: got 1, takes none; seeds is for that"),
        ({"methods": {"a": {"task": "bbc"}, "b": {}}}, "task: got ['bbc', 'e2e_nlg'], takes one"),
        ({"base": {}}, "task: got nothing, takes a value"),
        ({"base": {"task": "e2e"}}, "task: got 'e2e', takes one of"),
        ({"base": BASE | {"max_step": 1}}, "base: max_step: unknown; did you mean max_steps"),
        ({"grid": {"option.r": [1]}}, "grid: option.r: unknown; did you mean options"),
        ({"grid": {"max_steps.x": [1]}}, "grid: max_steps.x: max_steps is no mapping"),
        ({"grid": {"train_size": []}}, "grid: train_size: got [], takes one or several"),
        ({"grid": {"train_size": [5, 5]}}, "grid: train_size: got [5, 5], takes one or several"),
        ({"grid": {"seed": [5]}}, "grid: got seed, takes other fields; seeds is for that"),
        ({"grid": {"train_size": [0]}}, "train_size: got 0, takes"),
        ({"grid": {"learning_rate": [0.1]}, "methods": {"a": {"learning_rate": [1.0]}}},
         "methods.a: learning_rate: got a list, but it is in the grid as well"),
        ({"vary": ["prefx"]}, "vary: got 'prefx', did you mean prefix"),
        ({"seeds": []}, "seeds: "),
        ({"seeds": [1, 1]}, "seeds: got [1, 1], takes each once"),
        ({"metric": "blue"}, "metric: got 'blue', did you mean bleu"),
        ({"metric": "accuracy"}, "metric: got 'accuracy', takes bleu, rouge_l, chrf, loss"),
        ({"grid": {"train_size": [5]}, "methods": {"a": {}, "a, train size 5": {}},
          "vary": ["a"]}, "methods: two are named 'a, train size 5'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_in_one_line(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        config(**fields)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_mapping(tmp_path):
    file = Path(tmp_path / "compare.yaml")
    file.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match=r"compare\.yaml: got list, takes fields"):
        CompareConfig.read(file)
