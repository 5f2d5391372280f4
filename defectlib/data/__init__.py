"""Data: readers of data set layouts, tiles, few-shot splits, and an audit of what is wrong with a folder.

Modules are imported by name (``from defectlib.data import layouts, splits``); importing the package loads nothing.

* :mod:`~defectlib.data.catalog`: what is known about each data set (licence, citation, where it comes from, counts)
* :mod:`~defectlib.data.readers`: one small reader a layout
* :mod:`~defectlib.data.layouts`: a folder -> one index table; reading an image or a mask of a row
* :mod:`~defectlib.data.tiles`: square crops around the defects and from normal surface
* :mod:`~defectlib.data.splits`: few-shot splits without leaks
* :mod:`~defectlib.data.audit`: what is wrong with a folder
* :mod:`~defectlib.data.mini`: the built-in benchmark
"""
