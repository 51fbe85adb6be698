"""Which released version answers whom, in a worker and in the server.

`serving` is the page to read: the alias says who serves, who is tried and who served before; versions
are opened, checked, switched to and freed beside each other.
"""
