"""The calls to the functions in db/: connections, and the lanes on which operations share a call.

Words of this package: a *request* is one operation to apply. A *lane* is a queue of requests with the *lines* that
send them; a line has one connection. A *call* is what a line takes from the queue together. It is sent as one SQL
statement, or in *parts* of limited size, one statement each; a part that the database refuses as a whole is sent again
in halves. The *siding* is the lane of wallets in *trouble*: those that somebody keeps locked, or whose operations the
database refuses. A line's *patience* multiplies its lock timeout. A *thorough* line also tries requests that other
lines leave out because the database refused an earlier one on the same wallet in that call. The *contract* is the rules
in db/functions; an outcome is *ours* if they decided it: applied, or refused with a WA... SQLSTATE. A *party* is
whoever asks: a key's name. Parties are in *contention* while more than one is active: for CONTENTION seconds after a
request whose party is not that of the request before it.

The time of a request: with less than HEADROOM of REQUEST_DEADLINE left it goes in no call. (Bulk requests and the
siding have a HEADROOM of their own.) A call waits for locks for LOCK_TIMEOUT seconds or LOCK_PART of the deadline,
whichever is less, times its line's patience. Its first attempt may take FIRST_ATTEMPT of the time left, or
LEAST_ATTEMPT of the deadline if that is more. LEAD before the deadline the call is given up, and is too late by the
database's clock as well. At the deadline the request gets its 503.

An order to read it in: refusals, records, parties, session, database, line, trouble, lane, dispatch.
"""
