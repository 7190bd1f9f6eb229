"""Long texts: how they are cut, what in them must stay, what they are written in, how they come out of files.

Knows no chain.
"""
