"""The demo: real prompts, arriving one by one, in every mode this machine can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.measure.compare import Comparison, compare
from splitwiser_lab.measure.prompts import load_prompts
from splitwiser_lab.measure.workload import Arrival, Workload

_CHOSEN = (("conversation", 1), ("summarisation", 2), ("code", 1), ("radiology", 2), ("conversation", 2), ("code", 4))
_GAP_S = 0.4  # between arrivals: the next prompt comes while the one before is decoding


@dataclass(frozen=True)
class Demo:
    """The comparison, and the prompts as they were written."""

    comparison: Comparison
    prompts: list[str]

    @property
    def texts(self) -> list[str]:
        """What was written, as the first mode wrote it in the last repeat."""
        return self.comparison.runs[0].results[-1].texts


def demo(
    model: str = "smollm2-135m",
    *,
    new_tokens: int = 32,
    repeats: int = 3,
    report: Callable[[str], None] = lambda _: None,
    **load: Any,
) -> Demo:
    """Compare all modes on six prompts of this package, as turns of a chat where the model knows chats."""
    prompts = [load_prompts(kind)[number] for kind, number in _CHOSEN]
    report(f"loading {model}")
    with Engine.from_pretrained(model, **load) as engine:
        chat = getattr(engine.tokenizer, "chat_template", None) is not None
        ids = [tuple(engine.tokenize(prompt, chat=chat)) for prompt in prompts]
        arrivals = tuple(Arrival(_GAP_S * number, prompt, new_tokens) for number, prompt in enumerate(ids))
        workload = Workload("demo: six prompts", arrivals, ignore_eos=False)
        return Demo(compare(engine, workload, repeats=repeats, report=report), prompts)
