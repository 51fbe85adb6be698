"""What we know about a user and about items: behaviour sequences, statistics, candidates.

This folder knows messages (`topics`) and Redis (in `redis_store` alone). It knows nothing about
models, engines or Faust.
"""
