"""A small log that can be learnt within seconds, and a recipe of that size."""

from compression.logs.dataset import build_vocabulary, leave_one_out, read_log
from compression.logs.synth import SynthSettings, synthesize, write_log
from compression.retrieval.recipe import RetrievalRecipe

RECIPE = RetrievalRecipe(
    dim=16,
    layers=1,
    heads=2,
    ffn=32,
    max_history=20,
    dropout=0.1,
    batch_windows=32,
    learning_rate=5e-3,
    epochs=6,
    ema=0.9,
    averaged=3,
    bf16=False,
)


def write(folder, *, events=12_000, users=400, items=200):
    path = folder / "log.csv"
    write_log(path, synthesize(SynthSettings(events, users, items, 10, seed=4)))
    return path


def parts(path, **limits):
    """Sequences, their split and vocabulary."""
    sequences = read_log(path, **limits).sequences
    vocabulary = build_vocabulary(sequences, max_items=10**6, item_buckets=1, category_buckets=2)
    return sequences, leave_one_out(sequences), vocabulary
