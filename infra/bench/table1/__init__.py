"""`tailrace bench table1`: the paper's Table I, measured: five methods, each candidate with its own copy of
the history and all after one copy, beside the network that is served.

`shapes.py` how large all is, `steps.py` how the methods' networks come about, `arm.py` one graph in a
process of its own, `measure.py` all of them in turn, `report.py` tables and figures.
"""
