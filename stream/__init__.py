"""When it happens: the Faust rim around the request path.

`recommend.py` is the page to read: records in, lists out, no Faust. `feeder.py` consumes the hot
topics batch-wise and hands whole record batches to the agents in `agents/`; `sequencer.py` decides
what may be committed; `delivery.py` hands results to Kafka and waits until they are there.
"""
