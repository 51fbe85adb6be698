"""Servers of other projects, each started in a virtual environment of its own: `python -m` on these.

They import onnxruntime, numpy and the rival. What they are told comes in the environment (`session`).
"""
