"""Uploading saved adapters to the Hugging Face hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastprefix.formats.source import Source
from fastprefix.tuning.model_card import CARD_FILE


def push(
    save: Callable[[Path], object],
    repo_id: str,
    *,
    tags: Sequence[str] | None,
    private: bool | None,
    token: bool | str | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str | None,
    commit_description: str | None,
) -> Any:
    """Saves into a temporary folder and uploads it.

    Args:
        save: writes the adapters and the model card into a folder. If the repository has a card,
            the folder holds it already.
        repo_id: the repository; created if it does not exist.
        tags: additional tags of the card.
        private: whether a repository that is created is private; its owner's default if None.
        token: the hub's access token; the one stored on this machine if None.
        revision: the branch, created if it does not exist; "main" if None.
        create_pr: whether to open a pull request instead of committing.
        commit_message: "Upload adapter" if None.
        commit_description: the description of the commit.

    Returns:
        What ``huggingface_hub.HfApi.upload_folder`` returns.
    """
    from huggingface_hub import HfApi, ModelCard  # only needed to upload

    api = HfApi()
    repository = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repository, branch=revision, token=token, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = Source(repository, revision=revision, token=token)
        if (existing := place.look_for(CARD_FILE)) is not None:
            (folder / CARD_FILE).write_bytes(existing.read_bytes())
        save(folder)
        if tags:
            card = ModelCard.load(folder / CARD_FILE)
            data: Any = card.data
            data.tags = sorted({*(data.get("tags") or ()), *tags})
            card.save(folder / CARD_FILE)
        return api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=commit_message or "Upload adapter",
            commit_description=commit_description,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )
