"""What the engine is asked to do, and when: requests by length and arrival time.

A workload is plain data, made from a few figures and a seed, or read from a trace file. It knows no
model, no tokenizer and no clock: random prompts become token ids in `Workload.requests`, once the
vocabulary is known, and whoever serves it decides what to do when requests come faster than it can.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from splitwiser_lab.errors import WorkloadError
from splitwiser_lab.measure import azure
from splitwiser_lab.measure.trace import read_trace

Prompt = str | tuple[int, ...] | int

_PAPER = {"hf": (20, 1024, 12), "vllm": (512, 1024, 1024)}  # requests, input tokens, output tokens


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to come: text, token ids, or (an int) that many random tokens in; so many tokens out."""

    arrival_s: float
    prompt: Prompt
    max_new_tokens: int

    def __post_init__(self) -> None:
        ok = isinstance(self.arrival_s, int | float) and 0 <= self.arrival_s < math.inf
        _require(
            ok, f"arrival_s is {self.arrival_s!r}; it must be seconds from the start, a finite number of 0 or more"
        )
        if isinstance(self.prompt, int):
            _count("the prompt's length in tokens", self.prompt)
        ok = isinstance(self.prompt, int | str | tuple) and bool(self.prompt)
        _require(ok, f"a prompt is {self.prompt!r}; it must be text or a tuple of token ids, not empty, or a length")
        _count("the output's length in tokens (max_new_tokens)", self.max_new_tokens)


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request as the engine takes it: text or token ids, due `arrival_s` seconds after the start."""

    arrival_s: float
    prompt: str | list[int]
    max_new_tokens: int
    ignore_eos: bool


@dataclass(frozen=True, repr=False)
class Workload:
    """Requests in order of arrival. The same arguments and seed give the same workload, prompts included."""

    name: str
    arrivals: tuple[Arrival, ...]
    ignore_eos: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _require(bool(self.arrivals), f"workload {self.name!r} has no requests; give at least one")
        _random(self.seed)
        object.__setattr__(self, "arrivals", tuple(sorted(self.arrivals, key=lambda a: a.arrival_s)))

    def __len__(self) -> int:
        return len(self.arrivals)

    def __repr__(self) -> str:
        d = self.describe()
        when = f"{d['requests_per_s']:.3g}/s for {d['duration_s']:.4g} s" if d["requests_per_s"] else "all at once"
        prompts = f"{d['input_tokens_p50']:.0f} tokens (p50)" if d["input_tokens_p50"] else "text"
        return f"<Workload {self.name!r}: {len(self)} requests, {when}; {prompts} in, {d['output_tokens_p50']:.0f} out>"

    def requests(self, vocab_size: int, max_tokens: int | None = None) -> list[WorkloadRequest]:
        """The requests in order of arrival, random prompts drawn as token ids.

        Random ids lie in [min(10, vocab_size // 2), vocab_size): the first few are often special tokens.
        With `max_tokens` (the model's context), a random prompt and its output that are longer together
        are scaled down in proportion to fit, to no less than one token each; text and ids stay as they are.
        """
        lowest, ready = min(10, _count("vocab_size", vocab_size) // 2), []
        fits = max_tokens is None or _count("max_tokens", max_tokens) >= 2
        _require(fits, f"max_tokens is {max_tokens}; it must be 2 or more, as a request has a token in and one out")
        for index, arrival in enumerate(self.arrivals):
            prompt, output = arrival.prompt, arrival.max_new_tokens
            if isinstance(prompt, int):
                total = prompt + output
                if max_tokens is not None and total > max_tokens:
                    prompt, output = (max(1, length * max_tokens // total) for length in (prompt, output))
                # A stream per request: head() and max_tokens leave the other requests' prompts alone.
                prompt = tuple(_random(self.seed, 2, index).integers(lowest, vocab_size, prompt).tolist())
            ids = prompt if isinstance(prompt, str) else list(prompt)
            ready.append(WorkloadRequest(arrival.arrival_s, ids, output, self.ignore_eos))
        return ready

    def describe(self) -> dict[str, Any]:
        """Figures, flat: requests, seconds, requests/s, CV of the gaps, p50/mean/p95/max of the lengths in tokens.

        What does not exist is None: the rate when all arrive at once, input lengths where there is text.
        """
        gaps, lengths = self._gaps(), self._lengths()
        duration = float(gaps.sum())
        figures: dict[str, Any] = {"name": self.name, "requests": len(self), "duration_s": duration}
        figures["requests_per_s"] = len(gaps) / duration if duration else None
        figures["interarrival_cv"] = float(gaps.std() / gaps.mean()) if duration else None
        for side, tokens in zip(("input", "output"), lengths, strict=True):
            p50, p95, most = np.quantile(tokens, (0.5, 0.95, 1))
            for figure, value in {"p50": p50, "mean": tokens.mean(), "p95": p95, "max": most}.items():
                figures[f"{side}_tokens_{figure}"] = None if math.isnan(value) else float(value)
        return figures

    def scaled(self, tokens: float) -> Workload:
        """All lengths times `tokens` (0.1: a tenth), at least one token each; given text or ids are not cut."""
        _positive("tokens", tokens)
        arrivals = []
        for a in self.arrivals:
            prompt = max(1, round(a.prompt * tokens)) if isinstance(a.prompt, int) else a.prompt
            arrivals.append(Arrival(a.arrival_s, prompt, max(1, round(a.max_new_tokens * tokens))))
        return replace(self, name=f"{self.name}, {tokens:g}x tokens", arrivals=tuple(arrivals))

    def at_rate(self, requests_per_s: float) -> Workload:
        """The same requests, arrival times stretched to this rate. WorkloadError when all arrive at once."""
        gaps = self._gaps()
        _require(gaps.any(), f"all requests of {self.name!r} arrive at once: no gaps to stretch; use Workload.poisson")
        factor = 1 / gaps.mean() / _positive("requests_per_s", requests_per_s)
        arrivals = tuple(replace(a, arrival_s=float(a.arrival_s * factor)) for a in self.arrivals)
        return replace(self, name=f"{self.name}, {requests_per_s:g}/s", arrivals=arrivals)

    def head(self, n: int) -> Workload:
        """The first `n` requests, or all if there are fewer."""
        return replace(self, arrivals=self.arrivals[: _count("n", n)])

    def _gaps(self) -> NDArray[np.float64]:
        """Seconds between arrivals, `[requests - 1]`; one gap of 0 for a single request."""
        return np.diff([a.arrival_s for a in self.arrivals]) if len(self) > 1 else np.zeros(1)

    def _lengths(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Input and output tokens, `[requests]` each; NaN for text, whose length only a tokenizer can tell."""
        prompts = [len(a.prompt) if isinstance(a.prompt, tuple) else a.prompt for a in self.arrivals]
        inputs = [math.nan if isinstance(p, str) else p for p in prompts]
        return np.array(inputs, float), np.array([a.max_new_tokens for a in self.arrivals], float)

    @classmethod
    def closed(
        cls,
        requests: int | Sequence[str | Sequence[int]],
        prompt_tokens: int = 128,
        output_tokens: int = 32,
        seed: int = 0,
        ignore_eos: bool | None = None,
    ) -> Workload:
        """All at time 0: a number of random prompts of `prompt_tokens` each, or your own (text or token ids).

        `ignore_eos=None`: random prompts run to their full length, your own may stop.
        """
        random = isinstance(requests, int)
        prompts = [prompt_tokens] * _count("requests", requests) if isinstance(requests, int) else _prompts(requests)
        arrivals = tuple(Arrival(0.0, prompt, output_tokens) for prompt in prompts)
        return cls("closed", arrivals, random if ignore_eos is None else ignore_eos, seed)

    @classmethod
    def poisson(
        cls,
        rate: float,
        requests: int = 32,
        prompt_tokens: int = 128,
        output_tokens: int = 32,
        burstiness: float = 1.0,
        seed: int = 0,
        prompts: Sequence[str | Sequence[int]] | None = None,
    ) -> Workload:
        """Requests at `rate` per second with gamma gaps of shape `burstiness`, as `vllm bench serve` has it.

        1 is a Poisson process, less is burstier, more is steadier: the gaps' CV is 1/sqrt(burstiness). As
        there, gaps are rescaled so that their mean is exactly 1/rate; unlike there, the first request comes
        at time 0. `prompts` (text or ids), if given, are taken in turn instead of random ones, and may stop.
        """
        gaps = _random(seed, 1).gamma(_positive("burstiness", burstiness), size=_count("requests", requests) - 1)
        chosen = [prompt_tokens] if prompts is None else _prompts(prompts)
        arrivals = (Arrival(t, p, output_tokens) for t, p in zip(_times(gaps, rate), cycle(chosen), strict=False))
        return cls(f"poisson {rate:g}/s", tuple(arrivals), prompts is None, seed)

    @classmethod
    def azure(
        cls, trace: Literal["conv", "code"], rate: float | None = None, requests: int = 200, seed: int = 0
    ) -> Workload:
        """Requests drawn to look like Azure's 2023 conversation or code trace (a generator, not the trace).

        Lengths are drawn by group of requests, so that input and output belong together; gaps are drawn one
        by one, so the traces' slow waves are missing, and rescaled to `rate` (the trace's own: 5.5/s, 2.6/s).
        Draws are stratified: a small sample already has the trace's shape, but for the rarest gaps, which
        hold most of the code trace's burstiness.
        """
        _require(trace in list(azure.RATES), f"unknown trace {trace!r}; there are 'conv' and 'code'")
        random, count = _random(seed, 0), _count("requests", requests)
        inputs, outputs = azure.lengths(trace, count, random)
        gaps = azure.gaps(trace, count - 1, _random(seed, 1))
        times = _times(gaps, azure.RATES[trace] if rate is None else rate)
        arrivals = (Arrival(t, round(i), round(o)) for t, i, o in zip(times, inputs, outputs, strict=True))
        return cls(f"azure {trace}", tuple(arrivals), seed=seed)

    @classmethod
    def from_csv(cls, path: str | Path, requests: int | None = None) -> Workload:
        """The first `requests` rows (None: all) of a trace in Azure's format, also as .gz.

        Columns: TIMESTAMP (`2023-11-16 18:15:46.6805900`), ContextTokens, GeneratedTokens. The originals:
        https://github.com/Azure/AzurePublicDataset, folder data. Raises WorkloadError when the file cannot
        be read, lacks a column or has no rows, and, with the line, for a row that makes no sense.
        """
        limit = None if requests is None else _count("requests", requests)
        rows = read_trace(Path(path), limit)
        start = min(time for time, _, _ in rows)
        return cls(Path(path).name, tuple(Arrival((time - start).total_seconds(), i, o) for time, i, o in rows))

    @classmethod
    def paper(cls, pipeline: Literal["hf", "vllm"], requests: int | None = None, seed: int = 0) -> Workload:
        """Splitwiser's two (arXiv 2505.03763), all at time 0, random tokens, lengths fixed.

        `hf`: one batch of 20, 1024 in and 12 out. `vllm`: 512 requests, 1024 in and 1024 out.
        """
        _require(pipeline in list(_PAPER), f"unknown pipeline {pipeline!r}; the paper has 'hf' and 'vllm'")
        count, input_tokens, output_tokens = _PAPER[pipeline]
        workload = cls.closed(count if requests is None else requests, input_tokens, output_tokens, seed)
        return replace(workload, name=f"paper {pipeline}")


def distance(a: Workload, b: Workload) -> dict[str, float]:
    """Two-sample Kolmogorov-Smirnov distances, 0 (alike) to 1 (nothing in common).

    Of input, output and total tokens, and of the gaps between arrivals over their mean (0 where all arrive
    at once). Raises WorkloadError for text, whose length is not known.
    """
    samples: list[dict[str, NDArray[np.float64]]] = []
    for workload in (a, b):
        (inputs, outputs), gaps = workload._lengths(), workload._gaps()
        _require(not np.isnan(inputs).any(), f"{workload!r} holds text of unknown length; give its token ids instead")
        relative = gaps / gaps.mean() if gaps.any() else gaps
        samples.append({"input": inputs, "output": outputs, "total": inputs + outputs, "gaps": relative})

    distances = {}
    for figure, x in samples[0].items():
        y = samples[1][figure]
        at = np.concatenate([x, y])
        shares = [np.searchsorted(np.sort(sample), at, side="right") / len(sample) for sample in (x, y)]
        distances[figure] = float(np.abs(shares[0] - shares[1]).max())
    return distances


def _prompts(prompts: object) -> list[Prompt]:
    """Text or token ids, checked; ids may come as any sequence of whole numbers."""
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise WorkloadError(f"{prompts!r} is neither a number of requests nor a list of prompts; put prompts in a list")
    checked: list[Prompt] = []
    for prompt in prompts:
        try:
            checked.append(prompt if isinstance(prompt, str) else tuple(map(operator.index, prompt)))
        except TypeError:
            raise WorkloadError(f"a prompt is {prompt!r}; it must be text (str) or a list of token ids (int)") from None
    _require(bool(checked), "the list of prompts is empty; give one or more, or a number of random ones")
    return checked


def _times(gaps: NDArray[np.float64], rate: float) -> list[float]:
    """Arrival times from 0 on, `[gaps + 1]`, the gaps rescaled so that their mean is 1/rate."""
    _positive("rate", rate)
    _require(gaps.any() or not len(gaps), "all gaps drawn are 0: burstiness is too small for so few requests; raise it")
    return [0.0, *(np.cumsum(gaps) * (len(gaps) / rate / gaps.sum())).tolist()] if len(gaps) else [0.0]


def _random(seed: int, *stream: int) -> np.random.Generator:
    """A generator of its own for each use, so that changing one (the gaps) leaves another (the lengths) alone."""
    _require(isinstance(seed, int) and seed >= 0, f"seed is {seed!r}; it must be a whole number (int), 0 or more")
    return np.random.default_rng([seed, *stream])


def _count(what: str, value: int) -> int:
    _require(isinstance(value, int) and value >= 1, f"{what} is {value!r}; it must be a whole number (int), 1 or more")
    return value


def _positive(what: str, value: float) -> float:
    ok = isinstance(value, int | float) and 0 < value < math.inf
    _require(ok, f"{what} is {value!r}; it must be a finite number above 0 (for all at once: Workload.closed)")
    return value


def _require(holds: object, message: str) -> None:
    if not holds:
        raise WorkloadError(message)
