"""How models are made small and released: log to sequences, train, evaluate, export, registry.

This folder knows messages (`topics`) and the encoding shared with serving (`features.encoding`). It
knows nothing about Kafka, Redis, engines or Faust. torch is imported by the files that train; the
registry, the log reader and the synthetic log work without it.
"""
