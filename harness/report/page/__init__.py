"""The pages a run and a sweep end with: one file each, without network, built from records alone."""
