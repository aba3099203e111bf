"""The reference: what transformers' own `generate` writes with the same weights, and how a difference is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_ULPS = 4  # a logit is the end of a long sum: rounding moves it by a few units in the last place


@dataclass(frozen=True)
class TokenCheck:
    """Ours against the reference's tokens, for one request.

    `first_difference` is the index of the first output token that differs, None if none does. `gap` is the
    distance of the reference's two top logits there, `resolution` what the dtype can tell apart at their size.
    """

    first_difference: int | None = None
    gap: float = 0.0
    resolution: float = 0.0

    @property
    def identical(self) -> bool:
        """Every token is the same."""
        return self.first_difference is None

    @property
    def explained(self) -> bool:
        """The tokens are the same, or first differ where the dtype cannot tell the two top logits apart.

        Only half precision can explain a difference: in float32 the tokens must be equal.
        """
        return self.identical or self.gap <= self.resolution

    def __str__(self) -> str:
        if self.identical:
            return "identical"
        verdict = "explained" if self.explained else "NOT explained"
        return (
            f"differs from token {self.first_difference}: top logits {self.gap:.2g} apart, the dtype tells "
            f"{self.resolution:.2g} apart ({verdict})"
        )


class Reference:
    """A transformers model that answers what the tokens should be. One request at a time: no padding."""

    def __init__(self, model: Any) -> None:
        """`model` is an AutoModelForCausalLM in eval mode, with the engine's weights."""
        self.model = model

    def tokens(self, prompt: Sequence[int], max_new_tokens: int, ignore_eos: bool = False) -> list[int]:
        """Greedy output tokens of one prompt (token ids)."""
        import torch

        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": 0}
        for unused in ("temperature", "top_p", "top_k"):  # a model's own sampling defaults, off under greedy
            settings[unused] = None
        if ignore_eos:
            settings["min_new_tokens"] = max_new_tokens
            settings["eos_token_id"] = None
        ids = torch.tensor([list(prompt)], device=self.model.device)
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return [int(token) for token in out[0, len(prompt) :]]

    def check(self, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]) -> TokenCheck:
        """Compare two continuations of a prompt; where they part, ask the model how close the choice was."""
        same = sum(1 for _ in _common_prefix(ours, theirs))
        if same == len(ours) == len(theirs):
            return TokenCheck()
        gap, resolution = self._gap([*prompt, *theirs[:same]])
        return TokenCheck(same, gap, resolution)

    def _gap(self, tokens: Sequence[int]) -> tuple[float, float]:
        import torch

        with torch.inference_mode():
            logits: torch.Tensor = self.model(torch.tensor([list(tokens)], device=self.model.device)).logits[0, -1]
        first, second = logits.float().topk(2).values.tolist()
        half = logits.dtype in (torch.float16, torch.bfloat16)
        return first - second, _ULPS * torch.finfo(logits.dtype).eps * abs(first) if half else 0.0


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> list[int]:
    shared = []
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared.append(x)
    return shared
