"""Node packs that do to the host's queue what packs in use do: each is one file, copied into `custom_nodes`."""
