"""How it is run: the command line, local Kafka and Redis, container files, benchmarks.

This folder stands outside the import order: it may import every other one, and only tests import it.
"""
