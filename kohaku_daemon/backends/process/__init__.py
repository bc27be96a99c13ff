"""Tasks as processes of the machine itself: no root, no compiler, no daemon needed.

``backend`` is the front. One launch goes ``planning`` -> ``link`` -> ``keeper`` -> ``launching``
-> ``starting`` (-> ``sandbox``), writes through ``output``, leaves its traces in ``record``, and
is found again through ``kept``.

    runner --- link --- guard         waits; goes on if the keeper is killed
                          `- keeper   one for many launches; shares the guard's descriptors
                               |- init         namespaces only: first process of the pid
                               |               namespace; with it all that is inside ends
                               `- the program  in the launch's cgroup

Guard, keeper and init are not in a launch's cgroup: a full, frozen or killed group stays
watched. All that they run is standard library: ``guard`` and what it imports.
"""
