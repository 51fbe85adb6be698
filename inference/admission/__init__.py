"""Who gets a ranked list when not everybody can: token buckets for fairness, a concurrency limit for
safety.

`control` is the page to read. Everything here is arithmetic on a clock that is passed in, but for
`shared`, which counts a tier's use in Redis, away from the requests.
"""
