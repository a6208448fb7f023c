"""Data sets: attributes with a sentence that describes them, and texts with a class each."""

from fastprefix.tasks.classification import (
    ClassificationDataset,
    Example,
    load_folders,
    split_examples,
)
from fastprefix.tasks.descriptions import Record, load_descriptions, load_records
from fastprefix.tasks.encode import Collator, DescriptionDataset, encode_prompt, encode_record

__all__ = [
    "ClassificationDataset",
    "Collator",
    "DescriptionDataset",
    "Example",
    "Record",
    "encode_prompt",
    "encode_record",
    "load_descriptions",
    "load_folders",
    "load_records",
    "split_examples",
]
