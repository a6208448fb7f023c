"""Counts what a decoding step runs in fastprefix before a kernel starts: ``python tools/trip.py``.

A tiny Llama takes one step behind a prefix, under ``sys.setprofile``. For each backend three
figures are printed, of the library's own Python functions (comprehensions and lambdas are no
functions here):

- layer: one attention layer, from the call by transformers to the result (composed) or to the
  first ``kernel[grid]`` (triton, in the interpreter);
- step: what runs once for all layers, in hooks and masks;
- block: what entering and leaving ``use_prefix`` runs on a model that is patched already.

With ``--planned`` the step runs on a simulated GPU instead, and the layer is the last one of the
step: it launches by the plan that the first one made.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

# read when Triton is imported
os.environ.setdefault("TRITON_INTERPRET", "0" if "--planned" in sys.argv[1:] else "1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention
from triton.runtime.jit import KernelInterface

import fastprefix
from fastprefix import PrefixKV, patch_model, use_prefix

LIBRARY = Path(fastprefix.__file__).resolve().parent
KERNELS = (LIBRARY / "kernels").resolve()
LAYER = inspect.unwrap(LlamaAttention.forward).__code__
# `kernel[grid]`, compiled or interpreted
LAUNCH = KernelInterface.__getitem__.__code__


class Trip:
    """Calls by where they happen; `layers` has a list for each layer."""

    def __init__(self) -> None:
        self.layers: list[list[CodeType]] = []
        self.outside: list[CodeType] = []
        self._depth = 0  # of frames below the layer's first frame of ours
        self._launched = False

    def profile(self, frame: FrameType, event: str, _: Any) -> None:
        """For ``sys.setprofile``."""
        if event == "call":
            self._enter(frame)
        elif event == "return" and self._depth:
            self._depth -= 1

    def _enter(self, frame: FrameType) -> None:
        code = frame.f_code
        if self._depth:
            self._depth += 1
            self._launched |= code is LAUNCH
            if is_ours(code) and not self._launched:
                self.layers[-1].append(code)
        elif is_ours(code):
            caller = frame.f_back
            if caller is not None and caller.f_code is LAYER:
                self.layers.append([code])
                self._depth, self._launched = 1, False
            else:
                self.outside.append(code)


def is_ours(code: CodeType) -> bool:
    """Whether it is a function of the library."""
    path = Path(code.co_filename)
    inside = path.is_relative_to(LIBRARY) or path.is_relative_to(KERNELS)
    return inside and not code.co_name.startswith("<")


def figures(calls: list[CodeType]) -> dict[str, int]:
    """How many calls, of how many functions, in how many files."""
    return {
        "calls": len(calls),
        "functions": len({(code.co_filename, code.co_firstlineno) for code in calls}),
        "files": len({code.co_filename for code in calls}),
    }


def traced(work: Callable[[], Any]) -> Trip:
    """What one piece of work runs."""
    trip = Trip()
    sys.setprofile(trip.profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return trip


def measure(backend: str, show: bool) -> dict[str, dict[str, int]]:
    """The three figures of a backend."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    kv = PrefixKV.prefill(model, torch.arange(8)[None])
    patch_model(model, backend=backend)
    ids = torch.arange(8).reshape(2, 4)
    step = torch.ones(2, 1, dtype=torch.long)
    with torch.no_grad():

        def enter() -> None:
            with use_prefix(model, kv):
                pass

        enter()
        block = traced(enter)
        with use_prefix(model, kv):
            cache = model(ids, use_cache=True).past_key_values
            model(step, past_key_values=cache)
            trip = traced(lambda: model(step, past_key_values=cache))
    last = trip.layers[-1]
    if show:
        for code in last:
            print(f"{Path(code.co_filename).name}:{code.co_firstlineno} {code.co_name}")
    return {"layer": figures(last), "step": figures(trip.outside), "block": figures(block.outside)}


def main() -> None:
    """Prints the figures, as JSON on request."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--backends", nargs="+", default=["composed", "triton"])
    parser.add_argument("--show", action="store_true", help="list a layer's calls in order")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--planned", action="store_true", help="triton on a simulated GPU")
    options = parser.parse_args()
    if options.planned:
        sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
        import simulated_gpu

        simulated_gpu.install(compiled=False)
        options.backends = ["triton"]
    found = {backend: measure(backend, options.show) for backend in options.backends}
    if options.json:
        print(json.dumps(found))
        return
    for backend, parts in found.items():
        for part, f in parts.items():
            print(
                f"{backend:>9} {part:>6}: {f['calls']} calls of {f['functions']} functions "
                f"in {f['files']} files"
            )


if __name__ == "__main__":
    main()
