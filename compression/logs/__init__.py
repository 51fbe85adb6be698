"""Logs of clicks as they come, real or made up, and as per-user sequences."""
