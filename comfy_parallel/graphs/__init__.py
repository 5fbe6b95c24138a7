"""Graph stepping: a model's forward is recorded once per shape and replayed, which costs Python almost nothing."""
