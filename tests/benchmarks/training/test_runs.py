"""A whole comparison on a tiny model: run, stopped, gone on with, reported."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from training import runs, train
from training.material import InfixCollator, e2e
from training.pictures import compared, stability
from training.plan import METHODS, Run
from training.report import Comparison, claims, report
from training.runs import compare, do, number_of_runs

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
BY_NAME = {method.name: method for method in METHODS["e2e"]}
CHEAP = ("none", "prompt", "infix")
METHODS_HERE = [replace(BY_NAME[name], seeds=(0,)) for name in CHEAP]


@pytest.fixture(scope="module")
def made(source, budget, tmp_path_factory):
    folder, seen = tmp_path_factory.mktemp("runs"), []
    results, rates = compare(
        "e2e", METHODS_HERE, budget, source, folder, 1, lambda run, known: seen.append(known)
    )
    return folder, results, rates, seen


def test_all_runs_leave_their_figures(made, budget):
    folder, results, rates, seen = made
    assert seen == [False] * number_of_runs("e2e", METHODS_HERE, budget)
    assert len(list(folder.glob("*.json"))) == len(results) == len(seen)
    assert set(rates) == set(CHEAP)
    for run, result in results:
        steps = 0 if run.method.kind == "none" else budget.steps
        assert len(result["train_losses"]) == steps
        assert 4 < result["test_loss"] < 9  # at random, it is the logarithm of some 600 words
        assert 0 <= result["bleu"] <= 100
    assert rates["infix"] == rates["prompt"]


def test_what_is_done_is_not_done_again(made, source, budget):
    folder, results, rates, _ = made
    seen = []
    again = compare(
        "e2e", METHODS_HERE, budget, source, folder, 1, lambda run, known: seen.append(known)
    )
    assert all(seen)
    assert again == (results, rates)


def test_another_budget_makes_old_results_void_and_failures_keep_the_rest(
    made, source, budget, tmp_path
):
    folder, results, *_ = made
    good, _ = results[0]
    stale = replace(good, budget=replace(budget, test_size=2))
    broken = Run("e2e", replace(BY_NAME["lora"], options={"r": 0}), 1e-2, 0, budget)
    file = tmp_path / f"{good.key}.json"
    file.write_text((folder / file.name).read_text())
    seen = []
    with pytest.raises(RuntimeError, match=broken.key):
        do([stale, broken], source, tmp_path, 1, lambda run, known: seen.append(known))
    assert seen == [False, False]
    assert (
        json.loads(file.read_text())["fingerprint"]
        != json.loads((folder / file.name).read_text())["fingerprint"]
    )


def test_held_out_attributes_never_occur_in_training(source, budget):
    data = e2e(*source.data, source.tokenizer(), budget)
    prompts = [one.source for one in data.described]
    assert len(prompts) == len(set(prompts)) == budget.test_size
    assert all(one.targets for one in data.described)
    tokenizer = source.tokenizer()
    texts = [tokenizer.decode(data.train[i]["input_ids"]) for i in range(len(data.train))]
    assert not any(text.startswith(f"{prompt}\n") for text in texts for prompt in prompts)
    with pytest.raises(ValueError, match="held out"):
        e2e(*source.data, source.tokenizer(), replace(budget, test_size=10**6))


def test_an_infix_stands_where_the_description_begins(source, budget):
    data = e2e(*source.data, source.tokenizer(), budget)
    batch = InfixCollator(data.collator)([data.train[0], data.train[1]])
    for row, start in enumerate(batch["infix_positions"].tolist()):
        assert (batch["labels"][row, :start] == -100).all()
        assert batch["labels"][row, start] != -100


def test_costs_are_measured_for_every_method_and_once(source, budget, tmp_path, monkeypatch):
    methods = [BY_NAME["prefix"], BY_NAME["full"]]
    found = runs.costs("e2e", methods, source, budget, tmp_path)
    assert {what: set(values) for what, values in found.items()} == {
        "seconds": {"prefix", "full"},
        "megabytes": {"prefix", "full"},
    }
    assert all(value > 0 for value in found["seconds"].values())
    monkeypatch.setattr(runs, "measured", lambda *_: pytest.fail("measured again"))
    assert runs.costs("e2e", methods, source, budget, tmp_path) == found
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        runs.costs("e2e", methods[:1], source, budget, tmp_path)


def test_a_worker_ends_with_its_parent():
    """The parent may have had no time to stop it."""
    code = (
        f"import sys; sys.path.append({str(BENCHMARKS)!r}); "
        "import multiprocessing, os, time; from concurrent.futures import ProcessPoolExecutor; "
        "from training.runs import _worker; "
        "context = multiprocessing.get_context('spawn'); "
        "pool = ProcessPoolExecutor(1, mp_context=context, initializer=_worker); "
        "print(pool.submit(os.getpid).result(), flush=True); "
        "pool.submit(time.sleep, 600); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    try:
        parent.communicate(timeout=30)  # waits for all that hold its output, as the worker does
    except subprocess.TimeoutExpired:
        os.kill(worker, signal.SIGKILL)
        pytest.fail("the worker lives on")


def synthetic(losses):
    """Results in which methods have the losses given, at a rate or at all; seeds differ by 0.01."""
    results, rates = [], {}
    for method in METHODS["e2e"]:
        rates[method.name] = (method.rates or BY_NAME[method.like or "prefix"].rates)[0]
        for rate in method.rates or (rates[method.name],):
            loss = losses.get((method.name, rate), losses.get(method.name, 2.0))
            for seed in method.seeds:
                results.append(
                    {
                        "method": method.name, "learning_rate": rate, "seed": seed,
                        "train_losses": [3.0, 2.5, 2.0, 1.9, 1.8, 1.7], "trainable": 10,
                        "stored": 10, "bytes": 40, "dev_loss": loss + 0.01 * seed,
                        "test_loss": loss + 0.01 * seed, "bleu": 30.0,
                    }
                )  # fmt: skip
    return Comparison("e2e", results, rates, {"seconds": {"prefix": 1.0}, "megabytes": {}})


def test_claims_follow_the_figures(tmp_path):
    won = {"none": 3.0, "prefix": 1.0, ("prefix", 3e-1): 4.0, "small-text": 1.5, "infix": 2.5}
    assert [c.verdict for c in claims(synthetic(won))] == ["holds here"] * 4
    lost = {"none": 3.0, "prefix": 2.5, "small-text": 2.5, ("prefix-mlp2", 3e-3): 4.0}
    assert [c.verdict for c in claims(synthetic(lost))] == ["does not hold here"] * 4
    assert [c.verdict for c in claims(synthetic({"none": 3.0}))] == ["not decided"] * 4
    near = {"none": 3.0, ("prefix", 3e-1): 2.005}  # within what seeds vary
    assert claims(synthetic(near))[2].verdict == "not decided"


def test_the_report_and_its_pictures(tmp_path):
    c = synthetic({"none": 3.0, "prefix": 1.234})
    text = report([c], {"command": "here", "where": "somewhere"})
    assert (
        "| prefix, direct | 0.03 | 1.244 ± 0.010 | 30.0 ± 0.0 | 10 | 10 | 40 | 1.00 | – |" in text
    )
    assert all(method.title in text for method in METHODS["e2e"])
    compared([c], tmp_path / "a.png")
    stability(c, tmp_path / "b.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("a.png", "b.png"))


def test_news_are_classified(tmp_path, budget):
    """The other task's evaluation, on texts that one word decides."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ball", "vote", *"abcdefghij"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for label, word in (("sport", "ball"), ("politics", "vote")):
        (tmp_path / "news" / label).mkdir(parents=True)
        for i, a in enumerate("abcdefghij"):
            for b in "abcdefghij":
                file = tmp_path / "news" / label / f"{i}{b}.txt"
                file.write_text(f"{a} {word} {b}")
    method = next(m for m in METHODS["news"] if m.name == "full")
    small = replace(budget, steps=60, batch_size=8, train_size=99, dev_size=8, test_size=20,
                    max_length=8, bf16=False)  # fmt: skip
    source = train.Source(str(tmp_path / "model"), (str(tmp_path / "news"),))
    result = train.train(Run("news", method, 3e-3, 0, small), source)
    assert result["accuracy"] == 100
    assert result["test_loss"] < 0.6 < result["train_losses"][0]


def test_figures_that_were_cut_short_or_damaged(tmp_path):
    file = tmp_path / "run.json"
    figures = {"fingerprint": "x", "bleu": 12.5, "train_losses": [3.25, 2.5], "texts": ["ü"]}
    train.write_whole(file, figures)
    assert runs.known(file, "x") == figures
    assert runs.known(file, "y") is None
    content = file.read_bytes()
    damaged = [content[: len(content) * i // 17] for i in range(16)]
    damaged += [
        bytes([*content[:place], content[place] ^ 1 << place % 8, *content[place + 1 :]])
        for place in range(len(content))
    ]
    refused = 0
    for one in damaged:
        file.write_bytes(one)
        try:
            found = runs.known(file, "x")
        except ValueError as error:
            assert str(error).startswith(f"{file}: ")  # noqa: PT017
            refused += 1
        else:  # white space, or the name of the sha256
            assert {name: found[name] for name in figures} == figures
    assert refused > 0.7 * len(damaged)
    file.write_text(json.dumps(figures))  # of an older version
    assert runs.known(file, "x") == figures
