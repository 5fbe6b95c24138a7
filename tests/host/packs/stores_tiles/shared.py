"""The stores of the pack."""

from __future__ import annotations


class Options:
    images = None


batch = None
upscalers = [None]
options = Options()
