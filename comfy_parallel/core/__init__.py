"""Pure decisions, such as which slot takes a job. No torch, host, aiohttp, clock or lock."""
