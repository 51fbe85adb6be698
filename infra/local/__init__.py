"""Real servers on this machine: a Kafka broker and a Redis of our own, without containers.

`tailrace up`, the tests and the benchmarks start, stop and break them through the same classes.
"""
