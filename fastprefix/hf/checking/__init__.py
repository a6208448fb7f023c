"""Checks that hold a model to what it computed before it was patched, on a few tokens.

There are three questions. Each is asked once per model, when its answer matters:

- patch: does the patched model without a prefix compute what the bare one does?
- prefix: does every attention layer see its own share of a prefix, and only that, and the text
  behind it? Each layer gets what it got with prefix and text in one sequence, and must make the
  same of it (:mod:`fastprefix.hf.checking.trace`). Some layers have no such sequence to be held to
  (an encoder whose positions cannot be moved, cross-attention). A prefix must at least change what
  they make.
- prompt: does a text behind a prefilled prompt get the outputs of both in one sequence? Whatever a
  model keeps of a text besides keys and values shows here.

A model that fails is refused by what it did, not by its name.
"""
