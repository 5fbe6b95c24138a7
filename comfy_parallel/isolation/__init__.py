"""What one running job must not share with another."""
