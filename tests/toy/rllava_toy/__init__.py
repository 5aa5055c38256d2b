"""A whole plugin of the smallest possible parts, so that the core's tests need no real one.

It is found like any installed distribution: its `.dist-info` lies beside it, and pytest puts the folder on the path.
"""
