"""What is said: message types, topic names and bytes.

This folder knows nothing about Redis, models or Faust. A producer or a consumer in another
process needs only this folder to talk to Tailrace.
"""
