"""Slots on other machines: any ComfyUI that can be reached, spoken to by ComfyUI's own HTTP and WebSocket protocol."""
