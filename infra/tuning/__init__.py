"""`tailrace tune`: which compression is smallest and fastest at a loss that is allowed.

`recipe.py` what can be chosen, `network.py` a network made by it and measured, `study.py` the search,
`report.py` what it found.
"""
