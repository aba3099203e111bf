"""The reference: what transformers' own `generate` writes with the same weights, and how a difference is judged."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TokenCheck:
    """Ours against the reference's tokens, for one request.

    `first_difference` is the index of the first output token that differs, None if none does. `gap` is how far
    the reference's logit of its own token lies above its logit of ours there. `resolution` is what the dtype
    can tell apart at that place, measured: twice the largest rounding error of the reference's own logits.
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
            f"differs from token {self.first_difference}: the two logits are {self.gap:.2g} apart, the dtype tells "
            f"{self.resolution:.2g} apart ({verdict})"
        )


class Reference:
    """A transformers model that answers what the tokens should be. One request at a time: no padding."""

    def __init__(self, model: Any) -> None:
        """`model` is an AutoModelForCausalLM in eval mode, with the engine's weights."""
        self.model = model
        self._exact: Any = None  # the same weights in float32, made when half precision has to be judged

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
        same = len(_common_prefix(ours, theirs))
        if same == len(ours) == len(theirs):
            return TokenCheck()
        if same == min(len(ours), len(theirs)):  # one is the other's beginning: nothing was chosen differently
            return TokenCheck(same, float("inf"), 0.0)
        logits = self._logits(self.model, [*prompt, *theirs[:same]])
        gap = float(logits[theirs[same]] - logits[ours[same]])
        return TokenCheck(same, gap, self._resolution([*prompt, *theirs[:same]], logits))

    def _logits(self, model: Any, tokens: Sequence[int]) -> torch.Tensor:
        """Logits [vocabulary] after the last of `tokens`, as float32."""
        import torch

        with torch.inference_mode():
            out: torch.Tensor = model(torch.tensor([list(tokens)], device=model.device)).logits[0, -1].float()
        return out

    def _resolution(self, tokens: Sequence[int], logits: torch.Tensor) -> float:
        """Twice the largest error of `logits` against the same weights computed in float32; 0 in float32."""
        import torch

        if self.model.dtype not in (torch.float16, torch.bfloat16):
            return 0.0
        if self._exact is None:
            self._exact = copy.deepcopy(self.model).float()
        return 2 * float((self._logits(self._exact, tokens) - logits).abs().max())


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> list[int]:
    shared = []
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared.append(x)
    return shared
