"""The calls to the functions in db/: connections, and the lanes on which operations share a call.

Words of this package: a *lane* is a queue of requests and the *lines*, its connections, that send them. A *call* is one
call to apply_operations or apply_operation. The *siding* is the lane of wallets in *trouble*: those that somebody keeps
locked, or to which the database refuses something. A *party* is whoever asks: a key's name. Parties are in *company*
while several of them have asked within some seconds.
"""
