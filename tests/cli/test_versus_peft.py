"""The measurements that the demo prints."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastprefix.cli.versus_peft import Workload, compare
from fastprefix.training.memory import PeakMemory


def test_peak_memory_sees_what_was_freed_again() -> None:
    with PeakMemory() as memory:
        block = np.ones(25_000_000)  # 200 MB, every page touched
        time.sleep(0.01)
        del block
    assert 195 < memory.megabytes < 230


def test_nothing_is_measured_beside_a_peft_that_does_not_run(monkeypatch) -> None:
    reason = "transformers 9 takes PEFT 9 or newer, got 1"
    monkeypatch.setattr("fastprefix.cli.versus_peft.peft_mismatch", lambda: reason)
    with pytest.raises(RuntimeError, match=f"nothing to compare with: {reason}"):
        compare(None)


@pytest.mark.peft
def test_comparison_measures_both_sides_and_says_what_peft_refuses() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    workload = Workload(
        num_virtual_tokens=64,
        batch=4,
        prompt_length=4,
        new_tokens=3,
        train_batch=2,
        train_length=16,
        repeats=1,
    )
    results = compare(model, workload)
    for figure in ("decode_tokens_per_s", "train_step_s"):
        assert results[figure]["fastprefix"] > 0
        assert results[figure]["peft"] > 0
    for figure in ("decode_extra_mb", "train_extra_mb"):
        assert results[figure]["fastprefix"] >= 0
        assert results[figure]["peft"] >= 0
    assert results["train_step_s"]["peft_checkpointing"].startswith("refused: ")
    assert results["train_extra_mb"]["fastprefix_checkpointing"] >= 0
    assert not list(Path.cwd().glob("tmp*"))
