"""The GPUs of a Ray cluster as slots: Ray places and watches ComfyUIs, which are spoken to as other machines' are."""
