"""Retraining as a service: the lease, the clicks of a topic, the schedule and its probes."""

REFUSED, HELD, STOPPED = 3, 4, 75
"""What the process of a run ends with, beside 0 and 1: the gate let nothing through, another process has the
lease, it was asked to end."""
