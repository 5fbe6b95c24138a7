"""Facts about the host, ComfyUI."""
