"""The compatibility benchmark: its oracle, its judgement, its table."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastprefix.hf.versions import peft_mismatch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def compat():
    """The benchmark's modules; ``compat`` is no installed package."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(BENCHMARKS))
    from compat import architectures, capabilities, cells, libraries, oracle, report

    yield SimpleNamespace(
        **{
            m.__name__.split(".")[1]: m
            for m in (architectures, capabilities, cells, libraries, oracle, report)
        }
    )
    patch.undo()
    for name in [name for name in sys.modules if name.split(".")[0] in ("compat", "compatibility")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def case(compat):
    return compat.capabilities.Case.make(
        compat.architectures.ARCHITECTURES["llama"], compat.libraries.BARE
    )


def judged(compat, case, key, library):
    return compat.cells.run_cell(case, compat.capabilities.CAPABILITIES[key], library)


def test_the_oracle_is_the_cache_of_plain_transformers(compat):
    """Two ways to concatenate, where both are right: full attention, text behind the prefix."""
    from transformers import DynamicCache

    for name in ("llama", "gpt2", "opt"):
        architecture = compat.architectures.ARCHITECTURES[name]
        model = architecture.build()
        oracle = compat.oracle.Oracle(architecture, model)
        (row,), prefix, cache = architecture.rows((7,)), oracle.prefix(5), DynamicCache()
        for layer, (key, value) in enumerate(prefix):
            cache.update(key[None], value[None], layer)
        with torch.no_grad():
            mask = torch.ones(1, 12, dtype=torch.long)
            want = model(**row, attention_mask=mask, past_key_values=cache).logits
            got = oracle.run(row, prefix, compat.oracle.Semantics(5))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_the_oracle_slides_a_prefix_out_of_a_window_as_a_cache_does(compat):
    from transformers import DynamicCache

    architecture = compat.architectures.ARCHITECTURES["mistral"]
    model = architecture.build()
    oracle = compat.oracle.Oracle(architecture, model)
    (row,), prefix = architecture.rows((9,)), oracle.prefix(5)
    cache = DynamicCache()  # full, so that only the mask decides
    for layer, (key, value) in enumerate(prefix):
        cache.update(key[None], value[None], layer)
    with torch.no_grad():
        mask = torch.ones(1, 14, dtype=torch.long)
        want = model(**row, attention_mask=mask, past_key_values=cache).logits
        got = oracle.run(row, prefix, compat.oracle.Semantics(5, in_window=True))
        stays = oracle.run(row, prefix, compat.oracle.Semantics(5))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert (got - stays).abs().max() > 0.1


def test_its_beams_are_those_of_transformers(compat, case):
    rows = case.prompts(6, 4)
    none = compat.oracle.Semantics(0)
    for i, row in enumerate(rows):
        want = case.model.generate(
            **row, num_beams=3, num_return_sequences=3, max_new_tokens=5, do_sample=False
        )[:, -5:]
        assert torch.equal(case.oracle.beams(rows, 5, None, none, width=3)[3 * i : 3 * i + 3], want)


@pytest.mark.parametrize("key", ["forward", "left_padded", "gradient", "greedy_padded", "files"])
def test_fastprefix_passes(compat, case, key):
    cell = judged(compat, case, key, compat.libraries.LIBRARIES["fastprefix"])
    assert (cell.status, cell.message) == ("passes", "")


def test_peft_beside_it(compat, case):
    """Right, silently wrong, refused: all three of them occur, and are told apart."""
    peft = compat.libraries.LIBRARIES["PEFT"]
    found = {k: judged(compat, case, k, peft) for k in ("forward", "mixed", "checkpointing")}
    assert {key: cell.status for key, cell in found.items()} == {
        "forward": "passes",
        "mixed": "wrong",
        "checkpointing": "refused",
    }
    assert found["mixed"].error > 0.1
    assert found["checkpointing"].message.startswith("RuntimeError: ")


def spoiled(compat, spoil):
    """fastprefix, given other numbers than the oracle."""

    class Spoiled(compat.libraries.FastPrefix):
        def tune(self, architecture, model, prefixes, training=False):
            prefixes = {name: spoil(copy.deepcopy(p)) for name, p in prefixes.items()}
            return super().tune(architecture, model, prefixes, training)

    return Spoiled()


def one_number(prefix):
    prefix[1][1][0, -1] *= 1.05  # one token's value in one head of one layer, by a twentieth
    return prefix


@pytest.mark.parametrize("key", ["forward", "right_padded", "gradient", "files"])
def test_a_prefix_that_is_slightly_off_is_wrong(compat, case, key):
    cell = judged(compat, case, key, spoiled(compat, one_number))
    assert cell.status == "wrong"


def test_a_prefix_that_is_ignored_is_wrong_and_named(compat, case):
    class Ignoring(compat.libraries.FastPrefix):
        def tune(self, architecture, model, prefixes, training=False):
            return compat.libraries.Tuned(model)

    assert judged(compat, case, "forward", Ignoring()).message == "the prefix is ignored"
    assert judged(compat, case, "greedy", Ignoring()).status == "wrong"
    cell = judged(compat, case, "gradient", Ignoring())
    assert cell.status == "wrong"


def test_what_the_bare_model_cannot_do_is_blamed_on_nobody(compat):
    gpt2 = compat.capabilities.Case.make(
        compat.architectures.ARCHITECTURES["gpt2"], compat.libraries.BARE
    )
    cell = judged(compat, gpt2, "left_padded", compat.libraries.LIBRARIES["PEFT"])
    assert cell.status == "does not apply"
    assert cell.message.startswith("the bare model: relative error")
    ours = judged(compat, gpt2, "left_padded", compat.libraries.LIBRARIES["fastprefix"])
    assert ours.status == "passes"


def test_a_cell_that_hangs_is_cut(compat, case):
    class Hanging(compat.libraries.Library):
        name = "hanging"

        def tune(self, architecture, model, prefixes, training=False):
            while True:
                pass

    entry = compat.capabilities.CAPABILITIES["forward"]
    cell = compat.cells.run_cell(case, entry, Hanging(), limit=0.2)
    assert (cell.status, cell.message) == ("refused", "_TimeLimitError: took longer than 0.2 s")


def test_the_marked_part_is_replaced_and_nothing_else(compat, tmp_path):
    report, page = compat.report, tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for text in ("new", "newer"):
        report.insert(page, text)
    assert page.read_text() == f"before\n{report.BEGIN}\nnewer\n{report.END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="each once"):
        report.insert(page, "new")


def test_the_command_writes_table_json_and_picture(compat, tmp_path, monkeypatch):
    import compatibility

    page = tmp_path / "page.md"
    page.write_text("<!-- compatibility: begin --><!-- compatibility: end -->")
    command = [
        "compatibility.py",
        "--jobs",
        "1",
        "--page",
        str(page),
        "--output",
        str(tmp_path),
    ]
    command += ["--architectures", "llama,bert", "--capabilities", "forward,greedy"]
    monkeypatch.setattr(sys, "argv", command)
    compatibility.main()
    cells = json.loads((tmp_path / "compatibility.json").read_text())["cells"]
    assert len(cells) == 8
    ours = [c for c in cells if c["library"] == "fastprefix"]
    assert len(ours) == 4
    checked = ours if peft_mismatch() else cells  # PEFT's are what PEFT makes of it
    assert all(c["status"] in ("passes", "does not apply") for c in checked)
    assert "| forward, no padding | 2 of 2 |" in page.read_text()
    assert page.read_text().splitlines()[1] in (tmp_path / "compatibility.md").read_text()
    assert (tmp_path / "compatibility.png").stat().st_size > 10_000
