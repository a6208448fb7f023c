"""What is run, what is not run again, and what becomes of failures. The runs are pretended."""

import json
from dataclasses import replace

import pytest

from fastprefix.training.compare import run_compare
from fastprefix.training.grid import CompareConfig
from fastprefix_testing.pretended_runs import InThisProcess, times_begun, train

BASE = {"task": "e2e_nlg", "max_steps": 8}
RATES = [1e-3, 1e-2, 1e-1]
METHODS = {
    "prefix": {"method": "prefix", "learning_rate": RATES},
    "LoRA": {"method": "lora", "learning_rate": 3e-3},
}
BROKEN = {"method": "lora", "options": {"pretend": "raise"}}


def config(**fields):
    return CompareConfig.of({"base": BASE, "methods": METHODS, "seeds": [0, 1]} | fields)


def compare(folder, made, train=train):
    events = []
    engine = InThisProcess()
    found = run_compare(made, folder, engine=engine, show=events.append, train=train)
    return found, events


def folders(comparison):
    return {outcome.run.label: outcome.folder for outcome in comparison.outcomes}


def test_all_runs_leave_a_folder_and_the_best_rate_runs_with_all_seeds(tmp_path):
    found, events = compare(tmp_path, config())
    assert sorted(folders(found)) == [
        "LoRA, learning rate 0.003, seed 0",
        "LoRA, learning rate 0.003, seed 1",
        "prefix, learning rate 0.001, seed 0",
        "prefix, learning rate 0.01, seed 0",
        "prefix, learning rate 0.01, seed 1",
        "prefix, learning rate 0.1, seed 0",
    ]
    assert found.rates == {"prefix": 0.01, "LoRA": 0.003}
    chosen = found.chosen(found.cells[0])
    assert [(o.run.learning_rate, o.run.seed) for o in chosen] == [(0.01, 0), (0.01, 1)]
    for outcome in found.outcomes:
        assert outcome.folder.parent == tmp_path / "runs"
        assert outcome.result == json.loads((outcome.folder / "result.json").read_text())
        assert outcome.result["seed"] == outcome.run.seed
    ended = [event for event in events if event.state == "finished"]
    assert [event.done for event in ended] == [1, 2, 3, 4, 5, 6]
    assert {event.total for event in events} == {6} == {config().number_of_runs()}
    assert [event.state for event in events] == ["started", "finished"] * 6


def test_rates_are_chosen_by_validation_loss_and_a_diverged_run_never(tmp_path):
    validation = {1e-3: float("nan"), 1e-2: 2.5, 1e-1: 2.0}

    def opposite(made, folder):
        result = train(made, folder)
        if made.method == "prefix":
            loss = validation[made.learning_rate]
            # the test set would choose otherwise
            result |= {"validation": {"loss": loss}, "test": {"bleu": loss, "loss": -loss}}
            (folder / "result.json").write_text(json.dumps(result))

    found, _ = compare(tmp_path, config(), opposite)
    assert found.rates["prefix"] == 1e-1


def test_rates_cannot_be_chosen_without_a_validation_split(tmp_path):
    def without(made, folder):
        result = train(made, folder) | {"validation": None}
        (folder / "result.json").write_text(json.dumps(result))

    with pytest.raises(ValueError, match=r"learning_rate: got several .* no validation split"):
        compare(tmp_path / "several", config(), without)
    one = config(methods={"LoRA": METHODS["LoRA"]})
    found, _ = compare(tmp_path / "one", one, without)
    assert found.rates == {"LoRA": 0.003}


def test_finished_runs_are_not_repeated(tmp_path):
    before, _ = compare(tmp_path, config())
    after, events = compare(tmp_path, config())
    assert {event.state for event in events} == {"known"}
    assert [event.done for event in events] == [1, 2, 3, 4, 5, 6]
    assert all(outcome.known for outcome in after.outcomes)
    assert [replace(outcome, known=False) for outcome in after.outcomes] == list(before.outcomes)
    assert all(times_begun(folder) == 1 for folder in folders(after).values())


def test_more_seeds_and_a_new_name_keep_what_is_there(tmp_path):
    before, _ = compare(tmp_path, config())
    methods = {"other name": METHODS["LoRA"], "prefix": METHODS["prefix"]}
    after, events = compare(tmp_path, config(methods=methods, seeds=[0, 1, 2]))
    assert [event.state for event in events].count("finished") == 2
    kept, renamed = folders(before), folders(after)
    for seed in (0, 1):
        was = kept[f"LoRA, learning rate 0.003, seed {seed}"]
        assert renamed[f"other name, learning rate 0.003, seed {seed}"] == was
    assert renamed["other name, learning rate 0.003, seed 2"].name.startswith("other-name-")


def test_another_setting_or_other_data_make_another_run(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("{}\n")
    files = {split: str(data / f"{split}.jsonl") for split in ("train", "test")}
    own = BASE | {"data_files": files}

    def places(**fields):
        made = config(methods={"LoRA": METHODS["LoRA"]}, seeds=[0], **fields)
        return set(folders(compare(tmp_path / "out", made)[0]).values())

    first = places(base=own)
    assert places(base=own) == first
    assert places(base=own | {"batch_size": 2}) != first
    more = own | {"more_tests": {"other": str(data / "other.jsonl")}}
    (data / "other.jsonl").write_text("{}\n")
    further = places(base=more)
    (data / "other.jsonl").write_text("{} \n")
    assert places(base=more) != further
    (data / "train.jsonl").write_text("{} \n")
    changed = places(base=own)
    assert changed != first
    (data / "train.jsonl").write_text("{}\n")
    assert places(base=own) == first
    assert len(list((tmp_path / "out" / "runs").glob("lora-*"))) == 5


def test_the_weights_of_a_model_in_a_folder_count(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (model / "model.safetensors").write_bytes(b"1")
    made = config(base=BASE | {"model": str(model)}, methods={"LoRA": METHODS["LoRA"]}, seeds=[0])
    first = folders(compare(tmp_path / "out", made)[0])
    (model / "model.safetensors").write_bytes(b"2")
    assert folders(compare(tmp_path / "out", made)[0]) != first


def test_missing_data_is_told_before_anything_runs(tmp_path):
    own = BASE | {"data_files": {"train": str(tmp_path / "none.csv")}}
    with pytest.raises(FileNotFoundError, match=r"data_files: there is no file .*none\.csv"):
        compare(tmp_path, config(base=own))
    assert not list((tmp_path / "runs").glob("*/"))


def test_a_run_that_fails_stops_no_other_and_is_tried_again(tmp_path):
    methods = {"broken": BROKEN, **METHODS}
    found, events = compare(tmp_path, config(methods=methods))
    assert [outcome.run.label for outcome in found.failed] == ["broken, seed 0", "broken, seed 1"]
    assert found.failed[0].error == "options: got pretend, takes <less> | *more*"
    assert [event.error for event in events if event.state == "failed"] == [
        outcome.error for outcome in found.failed
    ]
    assert sum(outcome.result is not None for outcome in found.outcomes) == 6
    assert "broken" not in found.rates
    assert found.chosen(found.cells[0]) == []
    compare(tmp_path, config(methods=methods))
    assert times_begun(found.failed[0].folder) == 2


def test_rates_that_fail_are_not_chosen(tmp_path):
    def only_small(made, folder):
        if made.learning_rate > 1e-3:
            raise ValueError("too much")
        train(made, folder)

    found, _ = compare(tmp_path, config(methods={"prefix": METHODS["prefix"]}), only_small)
    assert found.rates == {"prefix": 1e-3}
    assert len(found.failed) == 2
    assert len(found.chosen(found.cells[0])) == 2


def test_a_damaged_result_counts_as_failed_and_is_not_repeated_silently(tmp_path):
    before, _ = compare(tmp_path, config())
    damaged = before.outcomes[0].folder
    (damaged / "result.json").write_text('{"seed": ')
    found, _ = compare(tmp_path, config())
    (failed,) = found.failed
    assert failed.folder == damaged
    assert str(damaged / "result.json") in failed.error
    assert failed.error.endswith("without its folder it runs again")


def test_a_run_that_leaves_no_result_has_failed(tmp_path):
    found, _ = compare(tmp_path, config(), lambda made, folder: None)
    assert len(found.failed) == len(found.outcomes) == 5
    assert "result.json" in found.failed[0].error


def test_two_methods_that_are_the_same_run_once(tmp_path):
    twice = {"20 tokens": {"options": {"num_virtual_tokens": 20}}, "lengths": {}}
    made = config(methods=twice, grid={"options.num_virtual_tokens": [10, 20]}, vary=["lengths"])
    found, _ = compare(tmp_path, made)
    assert len(found.outcomes) == 6
    assert len({outcome.folder for outcome in found.outcomes}) == 4
    assert all(times_begun(outcome.folder) == 1 for outcome in found.outcomes)
