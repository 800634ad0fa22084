"""One function per kind of request: a request and the store in, artifacts out.

Runs wherever it is called; knows no Ray.
"""
