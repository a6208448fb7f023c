"""The suites' cases: names, what is published, and that all providers of tiny ones agree."""

import pytest
import torch

from fastprefix.bench.case import OURS
from fastprefix.bench.measure import measure
from fastprefix.bench.suites import SUITES, cases
from fastprefix.bench.train_suite import largest_batch

TINY = [(case.suite, case.label) for case in cases(tiny=True)]


@pytest.mark.parametrize("tiny", [False, True])
def test_names_are_unique_and_fastprefix_comes_first(tiny):
    found = cases(tiny=tiny)
    assert len({(case.suite, case.label) for case in found}) == len(found)
    assert all(case.providers()[0] == OURS for case in found)
    assert {case.suite for case in found} == set(SUITES)


def test_all_suites_take_less_than_25_minutes():
    assert sum(case.expected_s() for case in cases(["operator"])) < 7 * 60
    assert sum(case.expected_s() for case in cases()) < 25 * 60


def test_the_published_operator_cases_hold_what_earlier_figures_were_of():
    labels = {case.label for case in cases(["operator"])}
    assert labels >= {
        "decode B32 Hq32 Hkv8 D64 P1024 text 64 bfloat16",
        "decode B32 Hq32 Hkv8 D64 P4096 text 64 bfloat16",
        "decode B16 Hq9 Hkv3 D64 P512 text 64 bfloat16",
        "decode B16 Hq9 Hkv3 D64 P2048 text 64 bfloat16",
        "decode B32 H12 D64 P512 text 64 float32",
        "decode B8 H12 D64 P20 text 64 float32",
        "decode B1 Hq9 Hkv3 D64 P512 text 64 bfloat16",
        "backward B8 Hq9 Hkv3 D64 P512 text 128 bfloat16",
        "backward B8 H12 D64 P32 text 128 float32",
    }


def test_a_text_chooses_cases():
    assert {case.label.split()[0] for case in cases(only="prefill")} == {"prefill"}
    with pytest.raises(ValueError, match=r"case: got 'P7', which is in no label of serve"):
        cases(["serve"], only="P7")
    with pytest.raises(ValueError, match="suites: got 'trian', takes operator, generate, train"):
        cases(["trian"])


@pytest.mark.parametrize(("suite", "label"), TINY)
def test_all_who_can_do_a_tiny_case_agree(suite, label):
    (case,) = (each for each in cases([suite], tiny=True) if each.label == label)
    found = measure(case, torch.device("cpu"), rounds=1)
    assert set(found["providers"]) | set(found["left_out"]) == set(case.providers())
    for mine in found["providers"].values():
        assert set(mine["figures"]) == set(case.figures)
    assert not [why for why in found["left_out"].values() if why.startswith("RuntimeError")]


def test_the_largest_batch_lies_on_a_line_through_two_peaks():
    assert largest_batch({1: 150, 4: 300}, 1000) == 18  # 100 and 50 for each row
    assert largest_batch({1: 150, 4: 300}, 120) == 0
    assert largest_batch({4: 300}, 1000) is None
    assert largest_batch({1: 300, 4: 300}, 1000) is None
