"""Masks and texts of other tools and sets as items of our annotation format: `vr data import`.

A format is a file with a function `read(source, left)` that gives Media, and a line of
`formats.FORMATS`.
"""
