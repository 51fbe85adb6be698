"""Retraining as a service: the lease, the clicks of a topic, the schedule and its probes."""
