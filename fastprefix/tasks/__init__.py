"""A small data-to-text task: attributes to one sentence, from the package or from a file."""

from fastprefix.tasks.descriptions import Record, load_descriptions, load_records
from fastprefix.tasks.encode import Collator, DescriptionDataset, encode_prompt, encode_record

__all__ = [
    "Collator",
    "DescriptionDataset",
    "Record",
    "encode_prompt",
    "encode_record",
    "load_descriptions",
    "load_records",
]
