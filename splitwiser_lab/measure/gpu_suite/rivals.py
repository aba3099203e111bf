"""Others at the same work on the same GPU and weights: transformers' two ways, and vLLM where it is installed."""

from __future__ import annotations

import random

from splitwiser_lab.measure.gpu_suite.job import Job, over, summary
from splitwiser_lab.measure.peers import OursPeer, Peer, find_peers


def rivals(job: Job) -> None:
    """Many equal requests at once, by turns: output tokens per second, everything included but tokenizers."""
    plan, draw = job.plan, random.Random(0)
    engine = job.engine
    engine.set_mode("sequential")
    ids = range(10, engine.config.vocab_size)
    prompts = [draw.choices(ids, k=plan.peer_prompt) for _ in range(plan.peer_requests)]
    peers, missing = find_peers(engine, engine.model.reference(), job.vllm)
    for name, why in missing.items():
        job.skip(name, why)
    try:
        _by_turns(job, peers, prompts)
    finally:
        for peer in peers:
            peer.close()


def _by_turns(job: Job, peers: list[Peer], prompts: list[list[int]]) -> None:
    samples: dict[str, dict[int, float]] = {peer.name: {} for peer in peers}  # by round
    written: dict[str, list[list[int]]] = {}
    lasted: dict[str, float] = {}  # seconds, the last time
    going = list(peers)
    output = job.plan.peer_output
    # Round 0 warms up with the whole work: a cache that grows by concatenation asks for memory of new sizes at each
    # step, which on an H200 made the first call of HF generate 3.6 times as slow as its next one.
    for number in range(job.repeats + 1):
        for peer in list(going):
            what = f"{peer.name}, round {number}"
            if not job.time_for(what, 1.2 * lasted.get(peer.name, 0.0)):
                continue
            job.report(f"{job.shape}: {len(prompts)} requests {len(prompts[0])}→{output}: {what}")
            before = len(job.left_out)
            with job.trying(peer.name):
                lasted[peer.name], tokens = peer.run(prompts, output)
                if number:
                    samples[peer.name][number] = len(prompts) * output / lasted[peer.name]
                    written[peer.name] = tokens
            if len(job.left_out) > before:
                going.remove(peer)
    ours = samples[OursPeer.name]
    for peer in peers:
        rates = samples[peer.name]
        if rates:
            ratios = over(ours, rates)
            equal = sum(map(list.__eq__, written[peer.name], written.get(OursPeer.name, [])))
            job.add(
                peer=peer.name,
                settings=peer.settings,
                requests=len(prompts),
                prompt=len(prompts[0]),
                output=output,
                output_tok_s=summary(list(rates.values())),
                ours_over_theirs=summary(ratios) if ratios else None,
                tokens_as_ours=f"{equal} of {len(prompts)}",
            )
