"""Retraining as steps that can be taken up again, and the page that shows a run."""
