"""What people see: the dashboard's files, and the one that ComfyUI's own page loads. They talk to `http` only."""
