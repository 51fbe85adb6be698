"""How scores are computed: engines, shape buckets, one batcher, and the ranker that uses them.

This folder knows sequences and candidates (`features`) and released artefacts
(`compression.releases.registry`). It knows nothing about Kafka or Faust. Each engine's library is imported
inside that engine's file, when the engine is asked for.
"""
