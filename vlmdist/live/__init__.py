"""A run as people see it while it goes on: on the terminal of rank 0, and by ``vlmdist watch`` from anywhere else.

status (what a start says of itself) > reader (the run folder, read on) > standing (does it live?) > screen (lines) >
painter (lines on a terminal) > watch
"""
