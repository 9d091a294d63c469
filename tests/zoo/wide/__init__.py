"""Every architecture of the installed transformers that can be built offline from a shrunken configuration, by rule.

``shrink`` makes a configuration tiny, ``feed`` makes inputs from a forward signature, ``exceptions`` holds what no rule
gives (each with its reason), ``catalogue`` lists the attempts, ``expect`` derives the number of sites from the source
of the layers, ``run`` does it all in shards and writes ``status.json``.
"""
