"""The REST door: what arrives over HTTP, and what is answered."""
