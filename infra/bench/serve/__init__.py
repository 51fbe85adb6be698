"""`tailrace bench serve`: one ONNX model behind our servers and other people's, under one load.

Every arm gets the same requests at the same moments on the same cores. It knows no arm's insides: a
server is a child process with an address, and its answers are compared before it is measured.
"""
