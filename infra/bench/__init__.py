"""`tailrace bench NAME`: measurements and fault scenarios on real parts, each printed as a table.

Every one starts a broker, a Redis and a worker of its own (`rig`), so that nothing it does touches
what `tailrace up` runs. What is measured is written by `report`, with machine, versions and seed.
"""
