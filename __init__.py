"""ComfyUI imports this folder as a custom node; the work is done by prestartup_script.py. It adds no nodes."""

NODE_CLASS_MAPPINGS = {}
