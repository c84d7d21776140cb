"""The watch over ranks: a hang is named, a death is noticed, and everyone is out within 30 seconds (Linux).

A thread in every rank tells a hub in rank 0 once a second what the rank's main thread is doing, which that notes in a
``Heartbeat``. What ends the run:

failed   a rank said so: it prints its own error, and the others end silently with its exit code
gone     a connection ended without a word: the process was killed, or its machine is lost
late     a rank stays in a phase beyond the limit and the others wait for it: all ranks write their stacks, and one
         message names the late one, its step and its samples

``watch`` is what the loop holds, ``heartbeat`` what it notes. ``verdict`` decides who is late, ``hub`` asks it and
ends the run, ``rank`` is the thread in each rank, ``wire`` and ``join`` connect them, ``process`` has the stacks and
the ends of processes.
"""
