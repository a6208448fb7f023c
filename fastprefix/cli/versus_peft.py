"""fastprefix and PEFT side by side on one model: decoding and training, time and memory.

As a script this module measures either time or memory and writes JSON. :func:`compare` starts it
once for each: time needs the ordinary allocator, and memory one that returns freed blocks at once.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, StoppingCriteria

from fastprefix.hf.versions import enable_checkpointing, peft_mismatch
from fastprefix.kv import PrefixKV, to_flat
from fastprefix.training.memory import ALLOCATOR_ENVIRONMENT, PeakMemory
from fastprefix.tuning import PrefixConfig, PrefixTuningModel


@dataclass(frozen=True)
class Workload:
    """What both sides do.

    Attributes:
        num_virtual_tokens: prefix length P.
        batch: sequences decoded at once.
        prompt_length: tokens of each sequence before decoding.
        new_tokens: tokens decoded for each sequence; the clock starts after the first.
        train_batch: sequences of a training step.
        train_length: tokens of each.
        repeats: measured rounds, after one that is not counted.
    """

    num_virtual_tokens: int = 512
    batch: int = 16
    prompt_length: int = 16
    new_tokens: int = 16
    train_batch: int = 4
    train_length: int = 128
    repeats: int = 2


class _Side:
    """One library's tuned model, with what both must be able to do."""

    def __init__(self, tuned: Any, prefix: nn.Parameter, workload: Workload) -> None:
        self.tuned, self.workload = tuned, workload
        self.optimizer = torch.optim.AdamW([prefix], lr=1e-3)

    def decode(self) -> float:
        """Seconds of decoding, without the prompt's own forward."""
        self.tuned.eval()
        return _decode(self.tuned, self.workload)

    def train_step(self) -> float:
        """Seconds of a forward, a backward and an optimizer step."""
        start = time.perf_counter()
        w = self.workload
        self.tuned.train()
        ids = _tokens(w.train_batch, w.train_length)
        loss = self.tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


class _Clock(StoppingCriteria):
    """Never stops generate(), but records the time after each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def _decode(model: Any, w: Workload) -> float:
    clock = _Clock()
    ids = _tokens(w.batch, w.prompt_length)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=w.new_tokens,
        min_new_tokens=w.new_tokens,
        do_sample=False,
        pad_token_id=0,
        use_cache=True,
        stopping_criteria=[clock],
    )
    # the first step is the prompt's forward, which is not part of decoding
    return clock.times[-1] - clock.times[0]


def _tokens(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(100, 1000, (batch, length), generator=generator)


def _load(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def _fastprefix_side(folder: str, flat: Tensor, workload: Workload) -> _Side:
    tuned = PrefixTuningModel(_load(folder), PrefixConfig(workload.num_virtual_tokens))
    tuned.encoder.start_from(flat)
    return _Side(tuned, tuned.encoder.embedding, workload)


def _peft_side(
    folder: str,
    flat: Tensor,
    workload: Workload,
    load: Callable[[str], PreTrainedModel] = _load,
) -> _Side:
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=workload.num_virtual_tokens
    )
    tuned: Any = get_peft_model(load(folder), config)
    weight = tuned.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(flat)
    return _Side(tuned, weight, workload)


def _flat(folder: str, workload: Workload) -> Tensor:
    """A realistic prefix as [P, width]: the keys and values of a text."""
    return to_flat(PrefixKV.prefill(_load(folder), _tokens(1, workload.num_virtual_tokens)))


def _check_agreement(ours: _Side, theirs: _Side) -> None:
    """Refuses to compare the speed of two models that compute different things."""
    ids = _tokens(2, 32)
    logits = []
    for side in (ours, theirs):
        side.tuned.eval()
        with torch.no_grad():
            output = side.tuned(input_ids=ids, attention_mask=torch.ones_like(ids))
        logits.append(output.logits.float())
    error = (logits[0] - logits[1]).norm() / logits[1].norm()
    if not error < 0.05:  # two orders of rounding in bfloat16 through all layers
        raise RuntimeError(f"fastprefix and PEFT disagree: relative logit error {error:.3f}")


def _peft_checkpointing(folder: str, flat: Tensor, workload: Workload) -> str:
    """What PEFT does with gradient checkpointing: "works", or its refusal."""

    def load(folder: str) -> PreTrainedModel:
        model = _load(folder)
        enable_checkpointing(model)
        return model

    try:
        _peft_side(folder, flat, workload, load).train_step()
    except ValueError as error:
        return f"refused: {error}"
    return "works"


def _alternate(work: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median seconds of each piece of work. They run in turn, in alternating order."""
    for run in work.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for i in range(repeats):
        for name in list(work) if i % 2 == 0 else reversed(list(work)):
            seconds[name].append(work[name]())
    return {name: statistics.median(values) for name, values in seconds.items()}


def _checkpointed(side: _Side) -> Callable[[], float]:
    def step() -> float:
        side.tuned.activation_checkpointing_enable()
        try:
            return side.train_step()
        finally:
            side.tuned.activation_checkpointing_disable()

    return step


def measure_time(folder: str, w: Workload) -> dict[str, Any]:
    """Tokens per second of decoding and seconds of a training step, medians.

    Decoding is also timed on the model without a prefix, ``no_prefix``.
    """
    flat = _flat(folder, w)
    ours, theirs = _fastprefix_side(folder, flat, w), _peft_side(folder, flat, w)
    _check_agreement(ours, theirs)
    # The model without any prefix gives the upper bound of the ratio.
    decode = _alternate(
        {
            "fastprefix": ours.decode,
            "peft": theirs.decode,
            "no_prefix": partial(_decode, _load(folder), w),
        },
        w.repeats,
    )
    train = _alternate(
        {
            "fastprefix": ours.train_step,
            "peft": theirs.train_step,
            "fastprefix_checkpointing": _checkpointed(ours),
        },
        w.repeats,
    )
    tokens = w.batch * (w.new_tokens - 1)
    return {
        "decode_tokens_per_s": {name: tokens / seconds for name, seconds in decode.items()},
        "train_step_s": {**train, "peft_checkpointing": _peft_checkpointing(folder, flat, w)},
    }


def measure_memory(folder: str, w: Workload) -> dict[str, Any]:
    """Extra peak memory in 10^6 bytes.

    Decoding: above what the same generate() takes without any prefix. Training: above what is
    resident before the step (weights, prefix, optimizer state).
    """
    flat = _flat(folder, w)
    none = _peak(partial(_decode, _load(folder), w))
    decode, train = {}, {}
    for name, make in (("fastprefix", _fastprefix_side), ("peft", _peft_side)):
        side = make(folder, flat, w)
        decode[name] = max(0.0, _peak(side.decode) - none)
        side.train_step()  # the optimizer's state, allocated once and kept, is not extra
        train[name] = _peak(side.train_step)
        if name == "fastprefix":
            train[f"{name}_checkpointing"] = _peak(_checkpointed(side))
        del side
    return {"decode_extra_mb": decode, "train_extra_mb": train}


def _peak(work: Callable[[], Any]) -> float:
    with PeakMemory() as memory:
        work()
    return memory.megabytes


def compare(model: PreTrainedModel, workload: Workload | None = None) -> dict[str, Any]:
    """Measures both libraries on copies of a model, in processes of their own.

    Args:
        model: a decoder-only model; it is saved to a temporary folder in its dtype, in which all is
            measured.
        workload: what to measure.

    Returns:
        ``dtype``; and ``decode_tokens_per_s``, ``decode_extra_mb``, ``train_step_s`` and
        ``train_extra_mb``, each with ``fastprefix`` and ``peft``; see :func:`measure_time` and
        :func:`measure_memory`.

    Raises:
        RuntimeError: the installed PEFT does not run with transformers; or a measuring process
            failed, and the message holds the end of what it printed.
    """
    reason = peft_mismatch()
    if reason is not None:
        raise RuntimeError(f"nothing to compare with: {reason}")
    workload = workload or Workload()
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(Path(temporary, "model"))
        plain: Any = type(model)(model.config)
        plain.to(model.dtype)
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(folder)
        del plain
        results: dict[str, Any] = {"dtype": str(model.dtype).removeprefix("torch.")}
        for what, extra in (("time", {}), ("memory", ALLOCATOR_ENVIRONMENT)):
            out = Path(temporary, f"{what}.json")
            command = [
                sys.executable, "-m", "fastprefix.cli.versus_peft",
                what, folder, str(out), json.dumps(asdict(workload)),
            ]  # fmt: skip
            done = subprocess.run(
                command, env={**os.environ, **extra}, capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                raise RuntimeError(f"measuring {what} failed:\n{done.stderr[-2000:]}")
            results.update(json.loads(out.read_text()))
    return results


def _main(what: str, folder: str, out: str, workload: str) -> None:
    measure = {"time": measure_time, "memory": measure_memory}[what]
    torch.manual_seed(0)
    Path(out).write_text(json.dumps(measure(folder, Workload(**json.loads(workload)))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
