"""Candidate rankers with random weights everywhere, and histories for them."""

import torch

from compression.ranking.network import CandidateRanker
from compression.retrieval.network import NetworkConfig, RetrievalNetwork, full_attention
from compression.training.model import History


def config(**changes):
    fields = {"dim": 16, "layers": 2, "heads": 2, "ffn": 32, "activation": "relu", "max_history": 31}
    return NetworkConfig(**(fields | {"dropout": 0.0, "item_rows": 80} | changes))


def ranker(seed=0, attention=full_attention, **changes):
    torch.manual_seed(seed)
    made = CandidateRanker(RetrievalNetwork(config(**changes), attention))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.eval()


def history(lengths, slots, seed=0, rows=80):
    generator = torch.Generator().manual_seed(seed)
    items = torch.randint(1, rows, (len(lengths), slots), generator=generator)
    for user, length in enumerate(lengths):
        items[user, length:] = 0
    nothing = torch.zeros_like(items)
    return History(items, nothing, nothing, nothing, torch.tensor(lengths))


def scores(made, given, candidates):
    seen = given.lengths[:, None].expand(-1, candidates.shape[1])
    with torch.no_grad():
        return made(given, candidates, seen)[1]
