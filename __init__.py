"""ComfyUI imports this folder as a custom node; prestartup_script.py has installed what it does."""

from comfy_parallel.install import own_nodes, web_directory

NODE_CLASS_MAPPINGS = own_nodes()
WEB_DIRECTORY = web_directory()
