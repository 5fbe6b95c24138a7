"""Functions in the place of the methods of the queue that the server has."""

from .seen import NODE_CLASS_MAPPINGS, QUEUE, wrap_object

__all__ = ["NODE_CLASS_MAPPINGS"]

wrap_object(QUEUE)
