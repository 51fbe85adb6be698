"""Ways in which the events of a history look at one another, behind one contract (`base.py`)."""
