"""From logits to token ids: greedy, or by temperature and nucleus (top-p) with a given random number."""

from __future__ import annotations

import torch

from splitwiser_lab.model.batch import NOT_A_NUMBER, SamplingSpec


def sample(logits: torch.Tensor, specs: list[SamplingSpec]) -> torch.Tensor:
    """`logits` [S, V] and one spec a row -> token ids [S], NOT_A_NUMBER for a row that holds a NaN."""
    tokens = logits.argmax(dim=-1)
    largest = logits.gather(-1, tokens[:, None])[:, 0]  # PyTorch takes a NaN for the largest
    return resample(tokens.masked_fill_(largest.isnan(), NOT_A_NUMBER), logits, specs)


def resample(greedy: torch.Tensor, logits: torch.Tensor, specs: list[SamplingSpec]) -> torch.Tensor:
    """The `greedy` tokens [S], but for rows with a temperature one picked from `logits` [S, V].

    The random number of a row is turned into a token by the inverse of the cumulative distribution in
    float64: rounding differences between lanes are some 1e-7 of the probability, so all pick the same.
    The device is not waited for.
    """
    rows = [i for i, spec in enumerate(specs) if spec.temperature > 0]
    if not rows:
        return greedy
    chosen = [specs[i] for i in rows]

    def column(values: list[float]) -> torch.Tensor:
        return _upload(torch.tensor(values, dtype=torch.float64), logits.device)[:, None]  # [R, 1]

    index = _upload(torch.tensor(rows), logits.device)  # [R]
    below = logits[index].double()
    below -= below.amax(-1, keepdim=True)  # so that no temperature, however low, makes infinities
    scaled = below / column([spec.temperature for spec in chosen])
    probabilities = scaled.softmax(-1)  # [R, V]
    ordered, order = torch.sort(probabilities, dim=-1, descending=True, stable=True)  # [R, V]
    # Nucleus sampling (Holtzman et al., arXiv 1904.09751): the fewest tokens that reach top_p together.
    outside = ordered.cumsum(-1) - ordered >= column([spec.top_p for spec in chosen])
    ordered = ordered.masked_fill(outside, 0.0)
    kept = torch.zeros_like(ordered).scatter_(-1, order, ordered)  # back in vocabulary order
    cumulative = kept.cumsum(-1)
    threshold = column([spec.uniform for spec in chosen]) * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, threshold, right=True)[:, 0]  # [R]
    greedy_too = greedy[index]
    picked = torch.where(greedy_too == NOT_A_NUMBER, greedy_too, picked.to(greedy.dtype))
    return greedy.index_copy(0, index, picked)


def _upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`values` on `device`; to a GPU through pinned memory, or the copy would wait for all work before it."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)
