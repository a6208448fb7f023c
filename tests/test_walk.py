"""The walk over transformers' classes: it runs, and its judge can fail."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def walk():
    """The benchmark's modules; ``walk`` is no installed package."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(BENCHMARKS))
    from walk import classes, command, judge, library, report, run, ways

    modules = (classes, command, judge, library, report, run, ways)
    yield SimpleNamespace(**{module.__name__.split(".")[1]: module for module in modules})
    patch.undo()
    for name in [name for name in sys.modules if name.split(".")[0] in ("walk", "compat")]:
        del sys.modules[name]


def walked(walk, name, ways=None, library=None):
    """The cells of a class by way."""
    cells = walk.run.walk_class(walk.classes.all_classes()[name], ways, library)
    return {cell.way: cell for cell in cells}


def test_a_class_that_works_is_right_in_every_way(walk):
    for name in ("LlamaForCausalLM", "DistilBertForMaskedLM"):
        for cell in walked(walk, name).values():
            assert cell.status == "right", cell
            assert cell.error <= walk.judge.TOLERANCE


def test_a_class_that_bypasses_the_interface_is_refused_or_expanded_with_the_reason(walk):
    for cell in walked(walk, "FalconForCausalLM", ["patch", "prompt", "prefix"]).values():
        assert cell.status in ("refused", "expanded"), cell
        assert "AttentionInterface" in cell.message


# One class of each kind that once gave wrong results or an error that nobody meant.
KINDS = {
    "masks causal though the layers say otherwise": "BigBirdPegasusForCausalLM",
    "masks that decide between both sides": "SplinterForQuestionAnswering",
    "keys appended inside the layer": "DeepseekV4ForCausalLM",
    "attention called twice": "DiffLlamaForCausalLM",
    "a mask made of values": "DogeForCausalLM",
    "a state that nobody tells of": "Lfm2MoeForCausalLM",
    "positions from another number than 0": "XLMRobertaForCausalLM",
    "positions indexed by row": "Qwen4ExpForCausalLM",
    "no limit of positions in the configuration": "RecurrentGemmaForCausalLM",
    "several embeddings": "MusicgenForCausalLM",
    "layers handed several inputs": "MobileBertForQuestionAnswering",
    "an encoder-decoder that wants one text in both": "BartForSequenceClassification",
    "a decoder's own positions": "M2M100ForConditionalGeneration",
    "both sides without a mask, one side with it": "PaliGemmaForConditionalGeneration",
}


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_no_kind_is_wrong_or_fails_unawares(walk, name):
    if name not in walk.classes.all_classes():
        pytest.skip(f"this transformers has no {name}")
    for cell in walked(walk, name).values():
        assert cell.status not in ("wrong", "crash"), cell
        assert cell.status != "refused" or cell.message


def test_a_wrong_prefix_is_judged_wrong(walk):
    class Halved(walk.library.Library):
        """Every result comes back, from half of each value."""

        def use(self, model, kv):
            return super().use(model, replace(kv, values=tuple(x / 2 for x in kv.values)))

    for name in ("LlamaForCausalLM", "DistilBertForMaskedLM"):
        cells = walked(walk, name, library=Halved())
        for way, cell in cells.items():
            assert cell.status == ("right" if way.startswith("patch") else "wrong"), cell
        assert "standard deviations" in cells["prefix"].message


def test_a_model_that_patching_changes_is_judged_wrong(walk):
    class Changing(walk.library.Library):
        def patch(self, model):
            with torch.no_grad():
                model.lm_head.weight[0] += 0.1
            return super().patch(model)

    cells = walked(walk, "LlamaForCausalLM", ["patch", "patch padded"], Changing())
    assert {cell.status for cell in cells.values()} == {"wrong"}


def test_errors_that_nobody_meant_are_crashes(walk):
    class Broken(walk.library.Library):
        def prefill(self, model, ids, **more):
            raise IndexError("list index out of range")

    (cell,) = walked(walk, "LlamaForCausalLM", ["prompt"], Broken()).values()
    assert cell.status == "crash"
    assert "IndexError" in cell.message


def test_a_hang_ends_one_class_and_not_the_walk(walk):
    cells = walk.run.walk(["LlamaForCausalLM", "GPT2LMHeadModel"], ["patch"], limit=0.001)
    assert len(cells) == 2
    assert {cell.status for cell in cells} <= {"crash", "right"}
    assert any("took longer" in cell.message for cell in cells)


def test_the_page_counts_every_status_and_names_every_class(walk):
    cells = [
        walk.judge.Cell("A", "causal", "patch", "right"),
        walk.judge.Cell("B", "causal", "patch", "refused", "ValueError: B does not"),
        walk.judge.Cell("C", "masked", "patch", "wrong", "off by 3 standard deviations"),
    ]
    page = walk.report.page(cells, {"transformers": "5"})
    assert "| patch | 1 | 1 |" in page
    assert "- C, patch: `off by 3 standard deviations`" in page
    assert "- `ValueError: … does not`: B" in page


def test_the_file_has_every_cell_with_its_reason(walk):
    cells = [
        walk.judge.Cell("A", "causal", "patch", "right", error=1.23e-6),
        walk.judge.Cell("B", "causal", "patch", "refused", "ValueError: B does not"),
        walk.judge.Cell("B", "causal", "prompt", "refused", "ValueError: B does not"),
    ]
    found = json.loads(walk.command.as_json(cells, {"transformers": "5"}))
    assert found["reasons"] == ["ValueError: B does not"]
    assert found["classes"]["A"] == {"task": "causal", "ways": {"patch": ["right", 1.2e-6, None]}}
    assert found["classes"]["B"]["ways"]["prompt"] == ["refused", None, 0]
