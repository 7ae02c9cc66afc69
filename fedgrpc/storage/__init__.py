"""Files, folders and the database: what aggregators and workers keep on the disk, and how it gets there whole."""
