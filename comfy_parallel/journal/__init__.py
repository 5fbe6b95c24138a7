"""The durable queue: what was accepted, started and ended, in an SQLite file that outlives the server."""
