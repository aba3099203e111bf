"""The project's own prompts, from `data/prompts.json`. Knows no tokenizer and no workload."""

from __future__ import annotations

import json

from splitwiser_lab.errors import WorkloadError
from splitwiser_lab.measure import shipped


def load_prompts(kind: str | None = None) -> list[str]:
    """The prompts of one kind, or all, in the order of the file, as text.

    Kinds: conversation, code, summarisation, radiology (whose findings are invented: no patient). Raises
    WorkloadError for an unknown kind, and when the file is missing or damaged.
    """
    path = shipped.find("prompts.json")
    if path is None:
        looked = " and ".join(str(place) for place in shipped.PLACES)
        raise WorkloadError(f"prompts.json is missing (looked in {looked}): reinstall the package, or restore the file")
    try:
        prompts = [(str(prompt["kind"]), str(prompt["text"])) for prompt in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WorkloadError(f"{path} is damaged ({error!r}): restore the file, or reinstall the package") from error
    chosen = [text for of, text in prompts if kind in (None, of)]
    if not chosen:
        kinds = ", ".join(dict.fromkeys(of for of, _ in prompts)) or f"none in {path}"
        raise WorkloadError(f"there are no prompts of the kind {kind!r}; the kinds are: {kinds}")
    return chosen
