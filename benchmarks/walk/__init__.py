"""The walk over every model class of transformers that can be built small (``--all``)."""
