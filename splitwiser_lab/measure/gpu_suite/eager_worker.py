"""One process with eager transformers: reads a number of new tokens a line, generates a batch, answers `done`."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from splitwiser_lab.measure.peers import GeneratePeer
from splitwiser_lab.model.loading import load
from splitwiser_lab.model.shapes import SHAPES, random_model


def main(settings: dict[str, Any]) -> None:
    """Make the model, say `done`, and serve until standard input ends."""
    name, device, dtype = settings["model"], settings["device"], getattr(torch, settings["dtype"])
    model: Any = random_model(name, device, dtype) if name in SHAPES else load(name, device, dtype).reference()
    peer = GeneratePeer(model)
    vocabulary = model.config.vocab_size
    prompts = torch.randint(10, vocabulary, (settings["batch"], settings["prompt"])).tolist()
    print("done", flush=True)
    for line in sys.stdin:
        peer.run(prompts, int(line))
        print("done", flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
