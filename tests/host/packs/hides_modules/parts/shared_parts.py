"""The store of the pack."""

batch = None


def process():
    return batch.clone()
