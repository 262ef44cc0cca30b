"""The calls to the functions in db/: connections, and the lanes on which operations share a call.

Words of this package: a *lane* is a queue of requests and the *lines*, its connections, that send them. A *call* is
what a line sends at once; it may be made in *parts*, each one call to apply_operations or apply_operation. The *siding*
is the lane of wallets in *trouble*: those that somebody keeps locked, or to which the database refuses something. A
line's *patience* is how many times as long as others it waits for locks; a *thorough* one also tries what others leave
out of a call once part of it was refused. The *contract* is the rules in db/functions; an outcome is *ours* if they
decided it: applied, or refused with a WA... SQLSTATE. A *party* is whoever asks: a key's name. Parties are in *company*
for COMPANY seconds after a request whose party is not that of the request before it.

The time of a request, in parts of REQUEST_DEADLINE: with less than HEADROOM left it goes in no call. A call waits for
locks for LOCK_SHARE, times its line's patience, at most. Its first attempt may take FIRST_ATTEMPT of what is left, or
LEAST_ATTEMPT if that is more. (Bulk requests and the siding have a HEADROOM of their own.) LEAD before the deadline the
call is given up, and is too late by the database's clock as well. At the deadline the request gets its 503.

An order to read it in: refusals, records, parties, session, database, line, trouble, lane, dispatch.
"""
