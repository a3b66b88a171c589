"""Posts: the queue of commands, the unit of work, and the commands themselves."""
