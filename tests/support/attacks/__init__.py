"""What hostile peers do to a host, and how each has to end for them.

An attack is a function of a ``Target``. It asserts that the host refused it or showed it out
in words of the protocol, and leaves nothing behind. Tests run each by itself; the chaos client
runs all of them at once, over and over.
"""
