"""The calls to the functions in db/: connections, and the lanes on which operations share a call."""
