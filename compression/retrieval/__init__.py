"""Retrieval over the full catalogue: a standard causal transformer, counted transitions, and both.

`network.py` what is trained, `recipe.py` how, `trainer.py` the loop, `release.py` what comes of it and
`table.py` how good that is; `retriever.py` what serves of one or several networks, `export.py` its graphs.
The network that `tailrace retrain` trains unless told otherwise (`compression.training.model`) is another.
"""
