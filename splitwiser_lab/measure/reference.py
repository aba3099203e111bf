"""The reference: what transformers' own `generate` writes with the same weights, and how a difference is judged."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch

_KEPT = 64  # logits at each place


@dataclass(frozen=True)
class TokenCheck:
    """Ours against the reference's tokens, for one request.

    `first_difference` is the index of the first output token that differs, None if none does. `gap` is how far
    the logit of the reference's own token lies above that of ours there, computed by it in float32. `resolution` is
    what the dtype can tell apart at that place, measured: twice the largest rounding error of the reference's logits
    in its own dtype. Who rounds no worse than that picks no token from farther below the largest.
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


@dataclass(frozen=True)
class Choices:
    """Logits [places, vocabulary] on the model's device: `rounded` as its dtype has them, `exact` in float32."""

    rounded: torch.Tensor
    exact: torch.Tensor

    @property
    def resolution(self) -> torch.Tensor:
        """How far apart two exact logits must lie for the dtype to tell which is larger [places]."""
        return 2 * (self.exact - self.rounded).abs().amax(-1)


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
        same = len(_common_prefix(ours, theirs))
        return self.continuation(prompt, theirs[: same + 1]).check(ours[: same + 1])

    def continuation(self, prompt: Sequence[int], theirs: Sequence[int]) -> Continuation:
        """The reference's tokens after a prompt, to compare many others with."""
        return Continuation(self, prompt, theirs)

    def worst_choice(self, prompt: Sequence[int], tokens: Sequence[int]) -> TokenCheck:
        """Of the tokens that somebody wrote after a prompt, the one least to be explained, each after the same text.

        Its `gap` is how far its logit lies below the largest there, in float32; `identical` if each is the model's
        own choice in its dtype.
        """
        import torch

        said = self.choices(prompt, tokens)
        written = torch.tensor(list(tokens), device=said.exact.device)[:, None]
        other = said.rounded.gather(-1, written)[:, 0] < said.rounded.amax(-1)
        if not other.any():
            return TokenCheck()
        gaps = said.exact.amax(-1) - said.exact.gather(-1, written)[:, 0]
        worst = int((gaps - said.resolution).where(other, -torch.inf).argmax())
        return TokenCheck(worst, float(gaps[worst]), float(said.resolution[worst]))

    def choices(self, prompt: Sequence[int], tokens: Sequence[int]) -> Choices:
        """What the model says at the place of each of `tokens` after a prompt."""
        import torch

        rounded = self._last_logits(prompt, tokens)
        if self.model.dtype not in (torch.float16, torch.bfloat16):
            return Choices(rounded, rounded)
        with _in_float32(self.model):
            return Choices(rounded, self._last_logits(prompt, tokens))

    def _last_logits(self, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """Logits [tokens, vocabulary] at the place of each of `tokens`."""
        import torch

        ids = torch.tensor([[*prompt, *tokens[:-1]]], device=self.model.device)
        known = inspect.signature(self.model.forward).parameters  # those of the prompt are many, and nobody's choice
        fewer = {"logits_to_keep": len(tokens)} if "logits_to_keep" in known else {}
        with torch.inference_mode():
            out: torch.Tensor = self.model(ids, use_cache=False, **fewer).logits[0]
        return out[-len(tokens) :]


@contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    """The model computes in float32 for a while; then it has the very same weights again, which others may share."""
    kept = [(weight, weight.data) for weight in model.parameters()]
    try:
        for weight, data in kept:
            weight.data = data.float()
        yield
    finally:
        for weight, data in kept:
            weight.data = data


class Continuation:
    """The reference's tokens after one prompt. All its choices are looked up at once, when one is first in doubt."""

    def __init__(self, reference: Reference, prompt: Sequence[int], tokens: Sequence[int]) -> None:
        """Use `Reference.continuation`."""
        self._reference, self._prompt, self._tokens = reference, list(prompt), list(tokens)
        self._known: _Largest | None = None

    def check(self, ours: Sequence[int]) -> TokenCheck:
        """As `Reference.check`."""
        theirs = self._tokens
        same = len(_common_prefix(ours, theirs))
        if same == len(ours) == len(theirs):
            return TokenCheck()
        if same == min(len(ours), len(theirs)):  # one is the other's beginning: nothing was chosen differently
            return TokenCheck(same, float("inf"), 0.0)
        if self._known is None:
            self._known = _Largest.of(self._reference.choices(self._prompt, theirs))
        told = [self._known.logit(same, token) for token in (theirs[same], ours[same])]
        if None in told:  # too far below the others to be kept
            exact = self._reference.choices(self._prompt, theirs[: same + 1]).exact[-1]
            told = [float(exact[token]) for token in (theirs[same], ours[same])]
        return TokenCheck(same, cast(float, told[0]) - cast(float, told[1]), self._known.resolution[same])


@dataclass(frozen=True)
class _Largest:
    """Of the exact logits at each of some places the largest, and the token of each, on the host."""

    logits: torch.Tensor  # [places, kept]
    tokens: torch.Tensor  # [places, kept]
    resolution: list[float]

    @classmethod
    def of(cls, said: Choices) -> _Largest:
        """Not all of them: a hundred thousand for each token of each request is slow to bring to the host."""
        logits, tokens = said.exact.topk(min(_KEPT, said.exact.shape[-1]))
        return cls(logits.cpu(), tokens.cpu(), said.resolution.tolist())

    def logit(self, place: int, token: int) -> float | None:
        """A token's, None if it is not among the largest."""
        found = (self.tokens[place] == token).nonzero()
        return float(self.logits[place, found[0, 0]]) if len(found) else None


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> list[int]:
    shared = []
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared.append(x)
    return shared
