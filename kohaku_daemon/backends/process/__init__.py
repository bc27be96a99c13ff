"""Tasks as processes of the machine itself: no root, no compiler, no daemon needed.

``backend`` is the front. One launch goes ``planning`` -> ``link`` -> ``launcher`` -> ``shim``
-> ``sandbox``, writes through ``output``, leaves its traces in ``record``, and is found again
through ``kept``.
"""
